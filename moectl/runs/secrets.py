"""Nothing secret is written down, and nothing true is changed.

Free text (a patch, a message, a command) is masked generously: assignments to secret-looking names
(``runs.secret_names``), the shapes of tokens, credentials in URLs and headers, and the very values of
secret-looking environment variables. A tree (a record) is masked by its keys and by the whole shape of
a token only; what a run is found and resumed by stays. A configuration is never masked: one that would
have to be is refused (``secret_in``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moectl.runs.secret_names import is_secret_value, looks_secret, secret_field

__all__ = ["MASK", "environment_secrets", "looks_secret", "mask_command", "mask_text", "mask_value", "secret_in"]

MASK = "***"

_DISTINCT = r"""
      \bgh[pousr]_[A-Za-z0-9]{16,} | \bgithub_pat_\w{16,} | \bglpat-[\w-]{16,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                     # AWS key ids
    | \bAIza[\w-]{30,} | \bya29\.[\w-]{16,}             # Google
    | \bxox[abeprs]-(?=[\w-]*\d)[\w-]{16,} | \bnpm_\w{36,} | \bpypi-(?=[\w-]*\d)[\w-]{40,}
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*              # JSON web tokens
"""
# Names of people's folders and runs (hf_poems2024, sk-learn-moe1) are no tokens. Those of Hugging Face have 34
# characters; those of OpenAI, Anthropic and others a long run of letters and digits somewhere.
_WHOLE_TOKEN = re.compile(
    rf"{_DISTINCT} | \bhf_[A-Za-z0-9]{{30,}} | \bsk-[\w-]*?(?=[A-Za-z]*\d)[A-Za-z0-9]{{20,}}[\w-]*", re.VERBOSE
)
_LIKELY_TOKEN = re.compile(
    rf"""{_DISTINCT} | \bhf_[A-Za-z0-9]{{16,}} | \bsk-[\w-]*?(?=[A-Za-z]*\d)[A-Za-z0-9]{{16,}}[\w-]*
    | \bxox[abeprs]-[\w-]{{8,}} | \bnpm_\w{{20,}} | \bpypi-[\w-]{{16,}}
    | (?<=earer[ ])[\w.~+/=-]{{8,}}                     # an authorization header
    """,
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
# user:password may hold a slash; host:port/path@x is no password.
_URL_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/@\"'<>]+|[^\s/@:\"'<>]*:(?!\d{1,5}/)[^\s\"'<>]*)(?=@)")
_HEADER = re.compile(
    r"(\bauthorization\\?[\"']?[ \t]*[:=][ \t]*\\?[\"']?(?:\w+[ \t]+)?)([\w.~+/=-]{8,})", re.IGNORECASE
)
# curl -u user:password; docker run -u 1000:1000 is none.
_USER = re.compile(r"((?<![\w-])(?:-u|--user)(?:[ \t]+|=)[\"']?[^\s:\"'$/]+:)(?!\d{1,5}(?!\S)|[$*/])([^\s\"']+)")
_OPTION = re.compile(r"(?<![\w-])(--[A-Za-z][\w-]*+)([ \t]+|[\"'],[ \t]*[\"'])([^\s\"'`-][^\s\"'`]{7,})")
_NAMED = re.compile(r"(?<![\w.-])([\w.-]++)\\?[\"']?\]?[ \t]*(?:[=!]=|:=|=>|[:=])[ \t]*")
_TYPED = re.compile(r"[\w\[\], |.]{1,60}?[ \t]*=[ \t]*(?=[rbfuRBFU]{0,2}[\"'])")
_QUOTED = re.compile(r"[rbfuRBFU]{0,2}(\"\"\"|'''|\\\"|\\'|\"|')((?:(?!\1)(?:\\[^\n]|[^\n]))*)")
_BARE = re.compile(r"[^\s\"'`,;)}\]]+")

# Where a record says what people wrote, and where it says what the run is.
_FREE_TEXT = frozenset({"message", "exit_reason", "problem"})
_IDENTITY = frozenset({"id", "name", "folder", "run_key", "config_hash", "sha256"})


def environment_secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """The values, of 8 characters and more, of secret-looking environment variables; longest first."""
    source = os.environ if environment is None else environment
    values = {value.strip() for name, value in source.items() if looks_secret(name) and len(value.strip()) >= 8}
    # A path (SSH_AUTH_SOCK, a credentials file) is not the secret, and would mask every log line.
    return sorted((value for value in values if not value.startswith("/")), key=len, reverse=True)


def mask_text(text: str, secrets: Iterable[str] | None = None) -> str:
    """``text`` with everything secret-looking replaced by ``***``.

    Args:
        secrets: exact values to mask beside the shapes; default: those of the environment.
    """
    for value in environment_secrets() if secrets is None else secrets:
        text = text.replace(value, MASK)
    text = _PRIVATE_KEY.sub(rf"\1{MASK}\2", text)
    text = _URL_CREDENTIALS.sub(MASK, text)
    text = _LIKELY_TOKEN.sub(MASK, text)
    text = _HEADER.sub(rf"\1{MASK}", text)
    text = _USER.sub(rf"\1{MASK}", text)
    text = _OPTION.sub(_masked_option, text)
    return _mask_assignments(text)


def _masked_option(match: re.Match[str]) -> str:
    option, space, value = match.groups()
    secret = looks_secret(option) and re.search(r"\d", value)
    return f"{option}{space}{MASK}" if secret else match[0]


def _mask_assignments(text: str) -> str:
    """Mask VALUE in every ``NAME = VALUE``, ``NAME: VALUE`` and ``NAME: type = VALUE`` whose name promises a secret."""
    parts: list[str] = []
    done = 0
    for named in _NAMED.finditer(text):
        name, begin = named[1], named.end()
        if named.start() < done or not secret_field(name):
            continue
        typed = _TYPED.match(text, begin)
        begin = begin if typed is None else typed.end()
        quoted = _QUOTED.match(text, begin)
        bare = None if quoted else _BARE.match(text, begin)
        if quoted and is_secret_value(name, quoted[2], quoted=True):
            first, last = quoted.span(2)
        elif bare and is_secret_value(name, bare[0], quoted=False):
            first, last = bare.span()
        else:
            continue
        parts += [text[done:first], MASK]
        done = last
    return "".join([*parts, text[done:]])


def _mask_whole(text: str, secrets: Sequence[str]) -> str:
    """``text`` without the values of the environment, credentials in URLs, and tokens of full length."""
    for value in secrets:
        text = text.replace(value, MASK)
    text = _PRIVATE_KEY.sub(rf"\1{MASK}\2", text)
    return _WHOLE_TOKEN.sub(MASK, _URL_CREDENTIALS.sub(MASK, text))


def mask_value(value: Any, secrets: Sequence[str] | None = None) -> Any:
    """A record's ``value`` with strings under secret-looking keys, and tokens anywhere, masked.

    Never a number or a bool, and never what identifies the run (``id``, ``name``, ``folder``, hashes).
    Messages are masked as free text.
    """
    known = environment_secrets() if secrets is None else secrets
    if isinstance(value, str):
        return _mask_whole(value, known)
    if isinstance(value, Mapping):
        return {key: _mask_field(str(key), item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_value(item, known) for item in value]
    return value


def _mask_field(key: str, value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, str) and key in _IDENTITY:
        return value
    if isinstance(value, str) and value and secret_field(key):
        return MASK
    if isinstance(value, str) and key in _FREE_TEXT:
        return mask_text(value, known)
    return mask_value(value, known)


def secret_in(config: Any, secrets: Sequence[str] | None = None, *, prefix: str = "") -> str | None:
    """The dotted key of the first string in a configuration that would have to be masked; None where there is none."""
    known = environment_secrets() if secrets is None else secrets
    if isinstance(config, str):
        return prefix if _mask_whole(config, known) != config else None
    if isinstance(config, (list, tuple)):
        found = (secret_in(item, known, prefix=f"{prefix}[{index}]") for index, item in enumerate(config))
        return next((key for key in found if key), None)
    if not isinstance(config, Mapping):
        return None
    # The keys of `data.sources` are domains that the user named, not options.
    domains = prefix.rpartition(".")[2] == "sources"
    for key, item in config.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if key in ("id", "name"):
            continue
        if isinstance(item, str) and item and not domains and secret_field(str(key)):
            return dotted
        inside = secret_in(item, known, prefix=dotted)
        if inside:
            return inside
    return None


def mask_command(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of secret-looking options masked, ``--set a.api_key=X`` and ``--set=...`` too."""
    known = environment_secrets()
    masked: list[str] = []
    hide_next = False
    for argument in arguments:
        if hide_next and not argument.startswith("--"):
            masked.append(MASK)
            hide_next = False
            continue
        glued = "--set=" if argument.startswith("--set=") else ""
        name, equals, value = argument.removeprefix(glued).partition("=")
        hide_next = argument.startswith("-") and not equals and looks_secret(argument)
        if equals and value and looks_secret(name):
            masked.append(f"{glued}{name}={MASK}")
        else:
            masked.append(glued + mask_text(argument.removeprefix(glued), known))
    return masked

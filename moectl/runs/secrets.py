"""Nothing secret is written down: what looks like a key or a password is masked first.

Three nets: names (``--api-key X``, ``HF_TOKEN=X``), shapes (``hf_...``, ``sk-...``, credentials in
a URL, private keys), and the very values of secret-looking environment variables, wherever they
turn up. Masking too much is the safe side; the word *tokens*, which this field is full of, is
not secret, and neither is a tokenizer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MASK = "***"

_SECRET_WORDS = frozenset({
    "token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "apikey", "accesskey", "secretkey",
    "privatekey", "credential", "credentials", "auth", "authorization", "bearer", "cookie", "webhook",
})  # fmt: skip
_SHAPES = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{8,}                              # Hugging Face
    | \bsk-[A-Za-z0-9_-]{8,}                            # OpenAI, Anthropic, and others in their shape
    | \bgh[pousr]_[A-Za-z0-9]{16,} | \bgithub_pat_\w{16,} | \bglpat-[\w-]{16,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                     # AWS key ids
    | \bAIza[\w-]{30,} | \bya29\.[\w-]{16,}             # Google
    | \bxox[abeprs]-[\w-]{8,} | \bnpm_\w{20,} | \bpypi-[\w-]{16,}
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*              # JSON web tokens
    | (?<=earer[ ])[\w.~+/=-]{8,}                       # an authorization header
    """,
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/@\"'<>]+(?=@)")
_NAME = r"[\"']?\b[\w.-]*(?:passw(?:or)?d|passphrase|secret|api[_-]?key|access[_-]?key|auth[_-]?token)[\w-]*[\"']?"
_ASSIGNED = re.compile(rf"({_NAME}\s*(?::\s*\w+\s*)?[:=]\s*)(\"[^\"\n]+\"|'[^'\n]+'|[^\s\"',;)}}\]]+)", re.IGNORECASE)
_TOKEN_LITERAL = re.compile(
    r"(\b[\w.-]*token[\"']?\s*(?::\s*\w+\s*)?[:=]\s*[\"'])([\w./+=-]{8,})(?=[\"'])", re.IGNORECASE
)
_TOKEN_VARIABLE = re.compile(r"(\b[A-Z0-9_]*TOKEN\s*[:=]\s*)([\w./+=-]{8,})")


def looks_secret(name: str) -> bool:
    """Whether an option's, variable's or key's name promises a secret: ``--hf-token``, ``API_KEY``.

    >>> [looks_secret(name) for name in ("--api-key", "HF_TOKEN", "--tokens", "--balance-tokens", "tokenizer")]
    [True, True, False, False, False]
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", name)]
    return bool(words) and (words[-1] == "key" or not _SECRET_WORDS.isdisjoint(words))


def _secret_field(name: str) -> bool:
    # Our own records hold keys that are no secret (run_key): a bare "key" says too little there.
    return looks_secret(name) and name != "run_key"


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
    text = _SHAPES.sub(MASK, text)
    text = _ASSIGNED.sub(rf"\1{MASK}", text)
    text = _TOKEN_LITERAL.sub(rf"\1{MASK}", text)
    return _TOKEN_VARIABLE.sub(rf"\1{MASK}", text)


def mask_value(value: Any, secrets: Sequence[str] | None = None) -> Any:
    """``value`` with every string in it masked, and whole values under secret-looking keys."""
    known = environment_secrets() if secrets is None else secrets
    if isinstance(value, str):
        return mask_text(value, known)
    if isinstance(value, Mapping):
        return {
            key: MASK if isinstance(item, str) and item and _secret_field(str(key)) else mask_value(item, known)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [mask_value(item, known) for item in value]
    return value


def mask_command(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of secret-looking options masked, ``--set a.api_key=X`` too."""
    known = environment_secrets()
    masked: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if hide_next and not argument.startswith("--"):
            masked.append(MASK)
            hide_next = False
            continue
        hide_next = argument.startswith("-") and not equals and looks_secret(argument)
        if equals and value and looks_secret(name.rsplit(".", 1)[-1]):
            masked.append(f"{name}={MASK}")
        else:
            masked.append(mask_text(argument, known))
    return masked

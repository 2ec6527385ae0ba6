"""Which names promise a secret, and which values beside them are one.

*Token* and *key* are everyday words of this field: ``tokens``, ``tokenizer``, ``eos_token``, ``token_mask``
and ``router_key`` hold no secret; ``hf_token``, ``stripe_key`` and ``WANDB_KEY`` do.
"""

from __future__ import annotations

import re

_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+")
# Also glued to other words: mypassword, dbsecret.
_CERTAIN = re.compile(
    r"passw(?:or)?d|passphrase|secret|(?:api|access|private)[_-]?key|auth[_-]?token|(?:^|[_-])pwd", re.IGNORECASE
)
_PASSWORD = re.compile(r"passw(?:or)?d|passphrase|pwd", re.IGNORECASE)
_SECRET_WORDS = frozenset({
    "credential", "credentials", "auth", "authorization", "bearer", "cookie", "webhook",
})  # fmt: skip
# A name that ends so speaks about a secret and holds none: secret_width, password_file, auth_mode.
_ABOUT = frozenset({
    "width", "size", "length", "len", "count", "dim", "type", "mode", "file", "path", "dir", "folder", "name", "names",
    "policy", "kind", "method", "required", "enabled", "timeout",
})  # fmt: skip
_PLAIN_KEYS = frozenset({
    "run", "router", "sort", "query", "cache", "group", "dict", "primary", "foreign", "lookup", "expert", "experts",
    "layer", "block", "gate", "metric", "config", "data", "state", "row", "column", "index", "hash", "json",
    "attention", "value", "weight", "weights", "public", "partition", "batch", "param", "field", "map", "object",
    "item", "dotted",
    "nested", "this", "other", "first", "last", "next", "each", "new", "old", "missing", "unknown", "unexpected",
})  # fmt: skip
_PLAIN_TOKENS = frozenset({
    "eos", "bos", "pad", "unk", "sep", "cls", "mask", "special", "begin", "start", "end", "stop", "per", "next", "each",
    "every", "this", "one", "last", "first", "image", "word", "by", "of",
})  # fmt: skip
_PLACES = frozenset({"prod", "production", "dev", "test", "staging", "value", "read", "write", "ro", "rw", "main"})

_NUMBER = re.compile(r"[-+]?(?:0x[\da-f]+|[\d_.]+(?:e[-+]?\d+)?)[:%]?", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\$\{.*|\$\(.*|\{[^{}]*\}?|<.*>|\$[A-Z_]+|\*+")
_KEYWORDS = frozenset({"none", "null", "true", "false", "str", "bytes", "int", "float", "bool", "any", "optional"})
_CALL = re.compile(r"[A-Za-z_][\w.]*[(\[]")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_SNAKE = re.compile(r"_*[a-z]+(?:_+[a-z]+)+_*")
_ROOTS = frozenset({"self", "cls", "os", "args", "config", "cfg", "settings", "options", "request", "ctx", "env"})
_SHORTEST = 8


def looks_secret(name: str) -> bool:
    """Whether an option's, variable's or key's name promises a secret: ``--hf-token``, ``API_KEY``.

    >>> [looks_secret(name) for name in ("--api-key", "HF_TOKEN", "--tokens", "--balance-tokens", "tokenizer")]
    [True, True, False, False, False]
    """
    field = _field(name)
    words = _words(field)
    if not words or words[-1] in _ABOUT:
        return False
    if _CERTAIN.search(field) or not _SECRET_WORDS.isdisjoint(words):
        return True
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "key":
        return before not in _PLAIN_KEYS
    return last.endswith(("token", "apikey")) and before not in _PLAIN_TOKENS


def secret_field(name: str) -> bool:
    """``looks_secret`` for code and records, where a bare ``key`` says too little."""
    return looks_secret(name) and _words(_field(name)) != ["key"]


def is_secret_value(name: str, value: str, *, quoted: bool) -> bool:
    """Whether ``value``, assigned to the secret-looking ``name``, is a secret itself and not code, or a placeholder."""
    if not re.search(r"[^\W_]", value) or _PLACEHOLDER.fullmatch(value):
        return False
    field = _field(name)
    certain = _CERTAIN.search(field) is not None
    if not certain and (len(value) < _SHORTEST or re.search(r"\s", value)):
        return False
    return quoted or not _is_code(field, value, certain=certain)


def _is_code(field: str, value: str, *, certain: bool) -> bool:
    if value[0] in "([{|>&" or value.lower() in _KEYWORDS or value.lower() == field.lower() or _CALL.match(value):
        return True
    if _NUMBER.fullmatch(value):
        return not _PASSWORD.search(field)
    if _DOTTED.fullmatch(value):
        parts = value.split(".")
        return not certain or parts[0] in _ROOTS or parts[-1].lower() == field.lower()
    return not certain and _SNAKE.fullmatch(value) is not None


def _field(name: str) -> str:
    return name.rpartition(".")[2]


def _words(field: str) -> list[str]:
    """The words of a name in lower case, without trailing numbers and places (``HF_TOKEN_2``, ``HF_TOKEN_PROD``)."""
    words = [word.lower() for word in _WORDS.findall(field)]
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in _PLACES):
        words.pop()
    return words

"""What is masked, and what must not be."""

from __future__ import annotations

import pytest

from moectl.runs.secrets import looks_secret, mask_command, mask_text, mask_value


@pytest.mark.parametrize(
    "text",
    [
        "login with hf_AbCdEfGhIjKlMnOp",
        "OPENAI sk-proj-abcdef1234567890",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAIOSFODNN7EXAMPLE",
        "https://someone:hunter2secret@example.org/x",
        "Authorization: Bearer abc.def-ghi_jkl",
        "+api_key = 'planted-value-1'",
        '  "password": "planted-value-1",',
        "password: planted-value-1",
        "+HF_TOKEN=planted-value-1",
        'token = "planted-value-1"',
        "-----BEGIN RSA PRIVATE KEY-----\nMIIplanted\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_secrets_go(text: str) -> None:
    masked = mask_text(text, [])
    assert "***" in masked
    for planted in ("AbCdEf", "abcdef", "IOSFODNN7", "hunter2", "def-ghi", "planted"):
        assert planted not in masked


@pytest.mark.parametrize(
    "text",
    [
        "tokens = tokenizer(text)",
        "num_tokens: 100000, tokens_per_second 12.5",
        "+    token_mask = mask.to(x.device)",
        "the risk-averse task-level disk-usage",
        "topk_weights_key = weights[key]",
        "https://example.org/a@b",
        "eos_token='<|endoftext|>'",
    ],
)
def test_the_words_of_the_field_stay(text: str) -> None:
    assert mask_text(text, []) == text


def test_values_of_secret_environment_variables_go_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_KEY", "correct-horse-battery")
    assert mask_text("an error about correct-horse-battery here") == "an error about *** here"


def test_command_line() -> None:
    given = (
        "moectl train --token abc --api-key=x1 --set a.password=y2 --steps 5 --tokens 7 --secret --json hf_abcdefgh12"
    )
    masked = "moectl train --token *** --api-key=*** --set a.password=*** --steps 5 --tokens 7 --secret --json ***"
    assert mask_command(given.split()) == masked.split()


def test_records_keep_their_run_key() -> None:
    given = {"run_key": "abc", "api_key": "abc", "tokens": 5, "nested": [{"url": "https://u:p@h"}]}
    assert mask_value(given) == {"run_key": "abc", "api_key": "***", "tokens": 5, "nested": [{"url": "https://***@h"}]}


def test_names() -> None:
    assert all(map(looks_secret, ["--hf-token", "API_KEY", "apiKey", "DB_PASSWORD", "--auth"]))
    assert not any(map(looks_secret, ["--tokens", "--balance-tokens", "tokenizer", "--monkey", "author", "keys"]))

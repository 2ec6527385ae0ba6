"""What is masked, and what must not be."""

from __future__ import annotations

import time

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
        "+  token: planted-value-1",
        "+wandb_token: planted-value-1",
        "-access_token=planted-value-1",
        "refresh_token: planted-value-1",
        "aws_session_token = planted-value-1",
        "stripe_key=planted-value-1",
        'WANDB_KEY="planted-value-1"',
        'encryption_key = "planted-value-1"',
        'encryption_key: str = "planted-value-1"',
        'os.environ["HF_TOKEN"] = "planted-value-1"',
        'if token == "planted-value-1":',
        r'"{\"token\": \"planted-value-1\"}"',
        'PASSWORD = """planted"""',
        'password="a \\"planted\\" value"',
        "password: 'planted value'",
        "config: token=planted-value-1",
        "HF_TOKEN_PROD=planted-value-1",
        "Authorization: Basic planted0dmFsdWU=",
        "Authorization: Negotiate planted0dmFsdWU=",
        '"Authorization": "Basic planted0dmFsdWU="',
        "curl -u user:planted1 https://example.org",
        "curl --user 'user:planted1' https://example.org",
        "https://example.org/x?token=planted-value-1&page=2",
        "https://example.org/x?page=2&token=planted-value-1",
        "https://u:planted/w@host/x",
        "moectl train --api-token planted-value-1",
        '["train", "--api-token", "planted-value-1"]',
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
        "tokens: 12345678",
        "tokenizer: bpe:2048",
        "num_tokens=12345678, tokens_seen='12345678'",
        "router_key: noisy-top-1",
        'run_key = "0123456789abcdef"',
        "max_key_length=123456789",
        "secret_width: 4",
        'key = "eval/lm_loss"',
        "cache_key = 'train-00000001'",
        'token_mode = "position-based"',
        "token: 12345678",
        'token = os.environ["HF_TOKEN"]',
        "api_key=settings.api_key, token=get_token(), password=password",
        "token = batch.next_token",
        "password: str, api_key: None",
        "TOKEN=${HF_TOKEN}",
        "--name sk-learn-moe1 --data ./hf_poems12345",
        "docker run -u 1000:1000 image",
        "https://localhost:8080/package@1.2",
        "Authorization is required",
    ],
)
def test_the_words_of_the_field_stay(text: str) -> None:
    assert mask_text(text, []) == text


def test_values_of_secret_environment_variables_go_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_KEY", "correct-horse-battery")
    assert mask_text("an error about correct-horse-battery here") == "an error about *** here"


def test_command_line() -> None:
    given = (
        "train --token abc --api-key=x1 --set a.password=y2 --steps 5 --tokens 7 --secret --json hf_abcdefghijk12345"
    )
    masked = "train --token *** --api-key=*** --set a.password=*** --steps 5 --tokens 7 --secret --json ***"
    assert mask_command(given.split()) == masked.split()


@pytest.mark.parametrize(
    ("given", "masked"),
    [
        ("--set moe.router.api_token=planted1", "--set moe.router.api_token=***"),
        ("--set=moe.router.hf_key=planted1", "--set=moe.router.hf_key=***"),
        ("--set=moe.router={api_token:planted-value-1}", "--set=moe.router={api_token:***}"),
        ("--name sk-learn-moe1 --set=data.sources.code=./hf_poems12345", None),
        ("--set=moe.router.secret_width=4 --set moe.router.router_key=gate --tokens=5", None),
    ],
)
def test_settings_on_the_command_line(given: str, masked: str | None) -> None:
    assert mask_command(given.split()) == (masked or given).split()


def test_masking_twice_is_masking_once() -> None:
    text = "token: planted-value-1\npassword = 'x y'\nhttps://u:p/w@host\nAuthorization: Basic planted0dmFsdWU="
    assert mask_text(mask_text(text, []), []) == mask_text(text, [])


def test_a_long_line_is_read_in_one_pass() -> None:
    text = "token" * 40_000 + " " + "a-b." * 40_000 + " password" * 10_000 + ": " * 10_000 + "'" * 10_000
    started = time.process_time()
    mask_text(text, [])
    assert time.process_time() - started < 2.0


def test_a_record_keeps_what_it_is_found_by() -> None:
    token = "sk-proj-" + "aB3dE" * 8
    given = {
        "id": "sk-learn-moe1", "name": "sk-learn-moe1", "steps": 5, "secret": True, "token": 12345678,
        "data": {"folder": "./hf_poems12345"}, "metrics": {"eval/token/lm_loss": 2.5}, "note": "see hf_poems12345",
    }  # fmt: skip
    assert mask_value(given, []) == given
    assert mask_value({"note": f"with {token}", "list": [token], "hf_token": "abc"}, []) == {
        "note": "with ***", "list": ["***"], "hf_token": "***",
    }  # fmt: skip
    assert mask_value({"message": "the server wants password: planted"}, []) == {
        "message": "the server wants password: ***"
    }


def test_records_keep_their_run_key() -> None:
    given = {"run_key": "abc", "api_key": "abc", "tokens": 5, "nested": [{"url": "https://u:p@h"}]}
    assert mask_value(given) == {"run_key": "abc", "api_key": "***", "tokens": 5, "nested": [{"url": "https://***@h"}]}


def test_names() -> None:
    assert all(map(looks_secret, ["--hf-token", "API_KEY", "apiKey", "DB_PASSWORD", "--auth"]))
    assert not any(map(looks_secret, ["--tokens", "--balance-tokens", "tokenizer", "--monkey", "author", "keys"]))

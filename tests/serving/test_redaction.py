from __future__ import annotations

import re

import pytest

from serving.redaction import HIDDEN, is_secret_name, redact, redact_text


@pytest.mark.parametrize(
    ("names", "secret"),
    [
        ("WANDB_API_KEY hf_token token password client_secret Authorization key", True),
        ("max_tokens ppo_max_token_len_per_gpu loss_agg_mode keys_seen tokenizer", False),
    ],
)
def test_names_of_secrets(names: str, secret: bool) -> None:
    assert [name for name in names.split() if is_secret_name(name) is not secret] == []


def test_tree_keeps_its_shape_and_loses_its_secrets() -> None:
    tree = {
        "reward": {
            "url": "http://me:hunter22@host:1/x",
            "token": "abc",
            "weights": [0.1, "Bearer abcdefghijkl"],
        },
        "ppo_max_token_len_per_gpu": 8192,
        "api_key": None,
    }
    assert redact(tree) == {
        "reward": {"url": f"http://{HIDDEN}@host:1/x", "token": HIDDEN, "weights": [0.1, f"Bearer {HIDDEN}"]},
        "ppo_max_token_len_per_gpu": 8192,
        "api_key": None,
    }


@pytest.mark.parametrize(
    "text",
    [
        "GET http://u:planted-secret@h/ failed",
        "http://u:p@planted-secret@h/",
        "http://h/search?q=a&api_key=planted-secret&k=3",
        "http://h/search?key=planted-secret",
        "https://h/blob?sv=1&sig=planted-secret%3D&se=2",
        "https://h/object?X-Amz-Signature=planted-secret",
        "WANDB_API_KEY=planted-secret python x",
        "{'password': 'planted-secret'}",
        "{'Authorization': 'Digest planted-secret'}",
        "Authorization: Basic planted-secret",
        "Cookie: session=planted-secret; theme=dark",
        "sent Basic dXNlcjpwbGFudGVkLXNlY3JldA==",
        "bearer planted-secret.abc",
        "-----BEGIN RSA PRIVATE KEY-----\nplanted-secret\n-----END RSA PRIVATE KEY-----",
        "AKIA" + "IOSFODNN7PLANTED",
        "AIza" + "SyPLANTED0123456789012345678901234567"[:35],
        "glpat-" + "planted-secret-01234",
        "ghp_" + "PLANTED0123456789012345678901234567890",
        "github_pat_" + "PLANTED01234567890123456789",
        "xoxb-" + "1234567890-PLANTED",
        "hf_" + "PLANTED0123456789abcdefghij",
        "login with sk-" + "planted-secret-0123456789abcdef",
        "tvly-" + "PLANTED0123456789abcdef",
        "npm_" + "PLANTED01234567890123456789012345678",
        "eyJhbGciOiJIUzI1NiJ9." + "eyJwbGFudGVkIjoxfQ.PLANTED-signature",
    ],
)
def test_free_text(text: str) -> None:
    hidden = redact_text(text)
    assert HIDDEN in hidden
    assert not re.search("planted|cGxhbnRlZ|wbGFudGVk", hidden, re.IGNORECASE)


@pytest.mark.parametrize(
    "text",
    [
        "the key to the city; a basic retriever; 30 tokens = 1 line; see http://127.0.0.1:8000/retrieve",
        "Basic Information about basic algorithms",
        "policy_tokens=12, max_tokens: 96, num_keys=4000, sort_key=title",
        "ask-me-anything-about-this, task-0123456789-abcdef, eyJ",
        "mail to http://host/?to=me and a@b",
    ],
)
def test_ordinary_text_is_untouched(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "piece", ["://", "key=", "eyJ-", "token ", "authorization:", "Basic ", "-----BEGIN ", "sk-"]
)
def test_hostile_text_takes_linear_work(piece: str) -> None:
    redact_text(piece * 200_000)

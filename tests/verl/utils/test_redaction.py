from __future__ import annotations

import pytest

from verl.utils.redaction import HIDDEN, is_secret_name, redact, redact_text


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "hf_token", "token", "password", "client_secret", "Authorization", "key"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["max_tokens", "ppo_max_token_len_per_gpu", "loss_agg_mode", "keys_seen", "tokenizer"]
)
def test_names_that_only_sound_secret(name: str) -> None:
    assert not is_secret_name(name)


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
        "http://h/search?q=a&api_key=planted-secret&k=3",
        "WANDB_API_KEY=planted-secret python x",
        "{'password': 'planted-secret'}",
        "login with sk-planted-secret-0123456789abcdef",
    ],
)
def test_free_text(text: str) -> None:
    assert "planted-secret" not in redact_text(text)


def test_ordinary_text_is_untouched() -> None:
    text = "token: a unit; the key to the city; 30 tokens = 1 line; see http://127.0.0.1:8000/retrieve"
    assert redact_text("policy_tokens=12, max_tokens: 96") == "policy_tokens=12, max_tokens: 96"
    assert redact_text(text).endswith("see http://127.0.0.1:8000/retrieve")

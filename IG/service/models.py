"""Check that the models exist and fit the settings, and identify them by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from IG.config import IGServiceConfig
from IG.entailment import entailment_label
from IG.prompts import PromptStyle
from serving.files import sha256_of_file
from serving.model_files import ModelNotFoundError, find_model_file, read_model_config

_DIGESTED = ("config.json", "*.safetensors", "*.bin", "tokenizer*.json", "*.model", "*.jinja")
"""Files that identify a model, in present and older formats."""


def require_models(config: IGServiceConfig) -> None:
    """Refuse missing and unsuitable models in seconds, before they are loaded.

    Raises ModelNotFoundError for a missing model, ValueError for one that does not fit the settings.
    """
    generator = _read_settings(config.model_path, flag="--model-path")
    entailment = _read_settings(config.entailment_model, flag="--entailment-model")
    labels = entailment.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    entailment_label(labels, model=config.entailment_model)
    _require_length(config, generator)
    if config.prompt_style is PromptStyle.chat and not _has_chat_template(config.model_path):
        raise ValueError(
            f"--prompt-style chat: the model {config.model_path} has no chat template; take an instruct "
            "model or --prompt-style plain"
        )


def _read_settings(name: str, *, flag: str) -> dict[str, Any]:
    """Return the config.json of a model. Raises ModelNotFoundError."""
    try:
        return read_model_config(name)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{flag} {error}") from error


def _require_length(config: IGServiceConfig, generator: Mapping[str, Any]) -> None:
    """Raise ValueError when the model has too few positions for the settings."""
    stated = generator.get("max_position_embeddings")
    positions = stated if isinstance(stated, int) else 0
    stretches = generator.get("rope_scaling") or generator.get("rope_parameters")
    stretches = stretches if isinstance(stretches, dict) else {}
    is_stretched = stretches.get("rope_type", stretches.get("type", "default")) != "default"
    if 0 < positions < config.max_model_len and not is_stretched:
        raise ValueError(
            f"--max-model-len is {config.max_model_len}, but {config.model_path} has {positions} positions; "
            "lower it, or use 0 for the model's own limit"
        )
    limit = config.max_model_len or positions
    if 0 < limit <= config.max_new_tokens:
        raise ValueError(
            f"--max-new-tokens is {config.max_new_tokens}, which leaves no room for a prompt: prompt and "
            f"answer have at most {limit} tokens (--max-model-len, or the model's positions)"
        )


def _has_chat_template(name: str) -> bool:
    """Return whether an existing model has a chat template."""
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        with suppress(ModelNotFoundError):
            path = find_model_file(name, file)
            if path.suffix == ".jinja" or '"chat_template"' in path.read_text("utf-8"):
                return True
    return False


def model_digest(folder: Path) -> str:
    """Return the SHA-256 over names and contents of a model's files, sorted by name, in hex.

    It reads all weights: seconds for large models.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _DIGESTED for path in folder.glob(pattern)}):
        digest.update(f"{path.name}\x00{sha256_of_file(path)}\x00".encode())
    return digest.hexdigest()

"""Are the models there, and which are they exactly."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from IG.entailment import entailment_label
from IG.prompts import PromptStyle
from IG.service.config import IGServiceConfig

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DIGESTED = ("config.json", "*.safetensors", "*.bin", "tokenizer*.json", "*.model")
"""What makes a model what it is; some on the hub have their weights or their tokenizer in the old formats."""


class ModelMissingError(ValueError):
    """A model is not where the settings say: the message names the setting and the fix."""


def require_models(config: IGServiceConfig) -> None:
    """Refuse in seconds what would fail after minutes of loading: models that are missing or do not fit.

    Raises ModelMissingError for a model that is not there, ValueError for one that cannot do its work.
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
    """Return the config.json of a model. Raises ModelMissingError."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        if folder.is_dir():
            raise ModelMissingError(
                f"{flag} {name}: the folder has no config.json, expected a Hugging Face model"
            )
        if not _HUB_NAME.fullmatch(name):
            raise ModelMissingError(
                f"{flag} {name}: no such folder; give the folder of a Hugging Face model or a hub name such "
                "as Qwen/Qwen2.5-3B (the small default models come with a full checkout: world/models)"
            )
        folder = _fetch(name, flag=flag).parent
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelMissingError(f"{flag} {name}: its config.json is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ModelMissingError(f"{flag} {name}: its config.json is not a JSON object")
    return settings


def _require_length(config: IGServiceConfig, generator: Mapping[str, Any]) -> None:
    """Raises ValueError when prompt and answer cannot have the tokens that the settings ask for."""
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
    """Whether a model, which is there, comes with a chat template."""
    folder = Path(name)
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / file
        if not folder.is_dir():
            try:
                path = _fetch(name, flag="--model-path", file=file)
            except ModelMissingError:
                continue
        if path.is_file() and (path.suffix == ".jinja" or '"chat_template"' in path.read_text("utf-8")):
            return True
    return False


def model_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the files that make the model, sorted by name; hex.

    It reads all weights: seconds for large models.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _DIGESTED for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\x00{content}\x00".encode())
    return digest.hexdigest()


def model_folder(name: str) -> Path:
    """Where the files of a model are: the folder itself, or what the hub's cache holds once it was loaded."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True))


def _fetch(name: str, *, flag: str, file: str = "config.json") -> Path:
    """Return a file of a model of the hub. Raises ModelMissingError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, etag_timeout=10))
    except (OSError, ValueError) as error:  # offline, unknown, gated: all are OSErrors or ValueErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelMissingError(
            f"{flag} {name}: neither a folder here nor a model that the hub gives us ({reason}); download it "
            "first or give a folder"
        ) from error

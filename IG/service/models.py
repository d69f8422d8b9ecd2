"""Are the models there, and which are they exactly."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from IG.service.config import IGServiceConfig

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DIGESTED = ("config.json", "*.safetensors", "*.bin", "tokenizer*.json", "*.model")
"""What makes a model what it is; some on the hub have their weights or their tokenizer in the old formats."""


class ModelMissingError(ValueError):
    """A model is not where the settings say: the message names the setting and the fix."""


def require_models(config: IGServiceConfig) -> None:
    """Look for both models' config.json. Raises ModelMissingError."""
    for flag, name in (("--model-path", config.model_path), ("--entailment-model", config.entailment_model)):
        folder = Path(name)
        if (folder / "config.json").is_file():
            continue
        if folder.is_dir():
            raise ModelMissingError(
                f"{flag} {name}: the folder has no config.json, expected a Hugging Face model"
            )
        if not _HUB_NAME.fullmatch(name):
            raise ModelMissingError(
                f"{flag} {name}: no such folder; give the folder of a Hugging Face model or a hub name such "
                "as Qwen/Qwen2.5-3B (the small default models come with a full checkout: world/models)"
            )
        _require_on_hub(name, flag=flag)


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


def _require_on_hub(name: str, *, flag: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json", etag_timeout=10)
    except (OSError, ValueError) as error:  # offline, unknown, gated: all are OSErrors or ValueErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelMissingError(
            f"{flag} {name}: neither a folder here nor a model that the hub gives us ({reason}); download it "
            "first or give a folder"
        ) from error

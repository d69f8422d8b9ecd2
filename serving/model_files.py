"""Find Hugging Face models: in a folder of this machine, or on the hub under an id `owner/name`."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_UNWANTED_FILES = ("onnx/*", "openvino/*", "checkpoint-*")
_PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_TIMEOUT_S = 10


class ModelNotFoundError(ValueError):
    """A model is missing or incomplete: the message begins with its name and says what to do."""


def find_local_model(name: str | Path) -> Path | None:
    """Return the folder of a model on this machine, or None if the name is a hub id.

    Raises ModelNotFoundError if it is neither, or the folder has no configuration.
    """
    folder = Path(name)
    if folder.is_dir():
        # A model of sentence-transformers may have its config.json in a subfolder that modules.json names.
        if not any((folder / file).is_file() for file in ("config.json", "modules.json")):
            raise ModelNotFoundError(
                f"{name}: the folder has no config.json, so it is not a Hugging Face model"
            )
        return folder
    if _HUB_ID.fullmatch(str(name)):
        return None
    raise ModelNotFoundError(
        f"{name}: no such folder, and not a hub id of the form owner/name; give a folder with config.json "
        "and *.safetensors, or an id such as Qwen/Qwen2.5-3B"
    )


def find_model(name: str | Path, *, cached_only: bool = False) -> Path:
    """Return the folder of a model; one of the hub is downloaded unless it is in the cache.

    `cached_only` never downloads. Raises ModelNotFoundError.
    """
    folder = find_local_model(name)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    try:
        if cached_only:
            return Path(snapshot_download(str(name), local_files_only=True))
        disable_progress_bars()
        logger.info("%s is not a folder here: looking in the cache and on the hub", name)
        return Path(
            snapshot_download(
                str(name), allow_patterns=list(_WANTED_FILES), ignore_patterns=list(_UNWANTED_FILES)
            )
        )
    except (OSError, ValueError) as error:  # offline, unknown, gated: no common class
        raise _hub_error(name, error) from error


def find_model_file(name: str | Path, file: str) -> Path:
    """Return one file of a model, downloaded if need be. Raises ModelNotFoundError if it is missing."""
    folder = find_local_model(name)
    if folder is None:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(str(name), file, etag_timeout=_HUB_TIMEOUT_S))
        except (OSError, ValueError) as error:
            raise _hub_error(name, error) from error
    if not (folder / file).is_file():
        raise ModelNotFoundError(f"{name}: the folder has no {file}")
    return folder / file


def read_model_config(name: str | Path) -> dict[str, Any]:
    """Return the content of a model's config.json. Raises ModelNotFoundError."""
    path = find_model_file(name, "config.json")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelNotFoundError(f"{name}: its config.json is not JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"{name}: its config.json is not a JSON object; copy it again")
    return config


def check_weights(folder: Path) -> None:
    """Raise ModelNotFoundError unless the folder has its weights as safetensors."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in _PICKLED_WEIGHTS for file in folder.glob(pattern))
    if pickled:
        raise ModelNotFoundError(
            f"{folder}: the weights are in {pickled[0]} only, a pickle, which can run any code when it is "
            "loaded; take a revision with model.safetensors, or convert it where you trust it: "
            "AutoModel.from_pretrained(folder).save_pretrained(folder)"
        )
    raise ModelNotFoundError(f"{folder}: the folder has no *.safetensors weights; copy the model again")


def _hub_error(name: str | Path, error: Exception) -> ModelNotFoundError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelNotFoundError(
        f"{name}: no such folder, and the Hugging Face hub did not give it ({reason}); check the name "
        "and the network, or download the model elsewhere and give its folder"
    )

"""Folders of sentence encoders and rerankers: where they are, what they consist of, which one it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from search_r1.search.errors import RetrieverError
from serving import model_files
from serving.files import sha256_of_file
from serving.model_files import ModelNotFoundError

_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Types of models that number positions from the id of the padding token + 1."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "sentencepiece.bpe.model")


def find_model(path: str | Path, *, role: str) -> Path:
    """Return the folder of a model: `path` itself, or that of a hub id, downloaded unless cached.

    `role` ("encoder") is for messages. Raises RetrieverError when there is no such model.
    """
    try:
        return model_files.find_model(path)
    except ModelNotFoundError as error:
        raise RetrieverError(f"{role} {error}") from error


def name_model(folder: Path) -> str:
    """Return the hub id of a folder in the hub's cache, else the folder's name: never a machine's path."""
    folder = folder.resolve()
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return folder.name


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON object, empty when there is no file. Raises RetrieverError for any other content."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RetrieverError(f"{path} is not JSON ({error}); copy the model again") from error
    if not isinstance(entries, dict):
        raise RetrieverError(f"{path} holds a {type(entries).__name__}, expected a JSON object")
    return entries


def check_weights(folder: Path, *, role: str) -> None:
    """Raise RetrieverError unless the weights of all modules are there, as safetensors."""
    places = [place for _, place in read_modules(folder) or [("", "")]]
    for number, place in enumerate(places):
        if number == 0 or any((folder / place).glob("*.bin")):
            try:
                model_files.check_weights(folder / place)
            except ModelNotFoundError as error:
                raise RetrieverError(f"{role} {error}") from error


def read_modules(folder: Path) -> list[tuple[str, str]] | None:
    """Return (class, folder) of the modules that a text passes, in order; folders relative to the model's.

    None when there is no modules.json, as in a plain transformer. Raises RetrieverError for a broken one.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    try:
        modules = [(str(entry["type"]), str(entry["path"])) for entry in json.loads(path.read_bytes())]
    except (ValueError, KeyError, TypeError) as error:
        raise RetrieverError(f"{path} is not a list of modules ({error!r}); copy the model again") from error
    for _, place in modules:
        if not (folder / place).resolve().is_relative_to(folder.resolve()):
            raise RetrieverError(f"{path} names a module outside of the model's folder: {place!r}")
    return modules


def list_module_files(folder: Path) -> list[Path]:
    """Return configuration and weights of the modules after the first, which have folders of their own."""
    places = [place for _, place in (read_modules(folder) or [])[1:] if place]
    return [
        file
        for place in places
        for pattern in ("*.json", "*.safetensors")
        for file in sorted((folder / place).glob(pattern))
    ]


def hash_model(folder: Path, *, further: Sequence[Path] = ()) -> str:
    """Return one hash of weights, configuration and tokenizer in `folder`, and of the `further` files.

    Files are hashed, not tensors, because those depend on the device's precision.
    """
    tokenizer = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *tokenizer]
    names = [file.name for file in files] + [f"{file.parent.name}/{file.name}" for file in further]
    digest = hashlib.sha256()
    for name, file in zip(names, [*files, *further], strict=True):
        digest.update(f"{name} {sha256_of_file(file)}\n".encode())
    return digest.hexdigest()


def read_length_limit(transformer: Path) -> int | None:
    """Return the longest sequence that the model has positions for; None where it does not state it."""
    config = read_json(transformer / "config.json")
    positions, padding = config.get("max_position_embeddings"), config.get("pad_token_id", 1)
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.get("model_type") in _POSITIONS_AFTER_PADDING and isinstance(padding, int):
        return positions - padding - 1
    return positions


def list_absent_weights(network: torch.nn.Module, *, folder: Path) -> list[str]:
    """Return the weights of a model of transformers that the files in `folder` lack: they are random.

    The libraries do not report it, so the model is loaded once more from stand-ins of one number each, which
    read no weight.
    """
    stand_ins: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                stand_ins[name] = torch.zeros(()).expand(weights.get_slice(name).get_shape())
    _, report = type(network).from_pretrained(  # type: ignore[operator]
        None, config=network.config, state_dict=stand_ins, dtype=torch.float32, output_loading_info=True
    )
    return sorted(report["missing_keys"])

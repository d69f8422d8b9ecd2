"""Safetensors files: written tensor by tensor and hashed meanwhile, read whole or by slices.

Several ranks may each write a part of a tensor. Where the part belongs stands in the header, in the format of
`torch.distributed.checkpoint`, whose reader gives every rank the slices that it needs. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from serving.files import FileRecord, replacing_file, write_json_atomically

MAX_FILE_BYTES = 5 * 10**9
"""Of one file of a model, as on the hub."""
_SINGLE, _SHARD, _INDEX = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors", "{}.index.json"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


Layout = Mapping[str, Tensor]
"""Names, shapes and dtypes of tensors, which are on the meta device."""
Readable = Callable[[], tuple[Layout, Callable[[str], Tensor]]]
"""Gives the layout of tensors, and what reads one by its name."""


def write_tensors(
    path: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    offsets: Mapping[str, Sequence[int]] | None = None,
) -> FileRecord:
    """Write a file atomically; `read` gives one CPU tensor after the other.

    `offsets`: where the tensors begin in those that they are parts of. Raises OSError with the path.
    """
    layout = _widest_first(layout)
    digest, size = hashlib.sha256(), 0
    with replacing_file(path) as partial, partial.open("wb") as file:
        for piece in _pieces(layout, read, offsets=offsets):
            digest.update(piece)
            file.write(piece)
            size += len(piece)
    return FileRecord(size=size, sha256=digest.hexdigest())


def _pieces(
    layout: Layout, read: Callable[[str], Tensor], *, offsets: Mapping[str, Sequence[int]] | None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file: length of the header, header, tensors."""
    metadata = {"format": "pt"}
    if offsets is not None:
        places = {name: {"saved_offsets": list(offset)} for name, offset in offsets.items()}
        metadata |= {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"}
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in layout.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the first tensor is aligned
    yield len(encoded).to_bytes(8, "little") + encoded
    for name, expected in layout.items():
        tensor = read(name)
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tensor.shape}, not as in the layout")
        if tensor.numel():
            yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_weights(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    is_writer: bool = True,
    max_bytes: int = MAX_FILE_BYTES,
) -> dict[Path, FileRecord]:
    """Write `model.safetensors`, or several files with an index, tensor by tensor; return what was written.

    Where `read` is collective all ranks call this, and the others than `is_writer` only read.
    """
    files = _split(layout, max_bytes=max_bytes)
    if not is_writer:
        for name in (name for file in files for name in file):
            read(name)
        return {}
    names = [_SHARD.format(i + 1, len(files)) if len(files) > 1 else _SINGLE for i in range(len(files))]
    records = {
        folder / name: write_tensors(folder / name, file, read)
        for name, file in zip(names, files, strict=True)
    }
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in layout.values())},
            "weight_map": {name: names[i] for i, file in enumerate(files) for name in file},
        }
        write_json_atomically(folder / _INDEX.format(_SINGLE), index)
    return records


def _split(layout: Layout, *, max_bytes: int) -> list[dict[str, Tensor]]:
    """Deal the tensors to files of at most `max_bytes`, or of one larger tensor."""
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in _widest_first(layout).items():
        num_bytes = tensor.nbytes
        if files[-1] and size + num_bytes > max_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += num_bytes
    return files


def _widest_first(layout: Layout) -> Layout:
    """Return the order in which every tensor of a file is aligned."""
    return dict(sorted(layout.items(), key=lambda item: -item[1].itemsize))


class TensorFiles:
    """The tensors of several safetensors files. Raises what safetensors raises for damaged ones."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._reader = HuggingFaceStorageReader(str(files[0].parent if files else ""))
        self._reader.fs = _Chosen(files)
        self._metadata = self._reader.read_metadata()

    @classmethod
    def of_model(cls, folder: Path) -> TensorFiles:
        """Open those of a Hugging Face folder: what the index names, else `model.safetensors`, else all."""
        index = folder / _INDEX.format(_SINGLE)
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return cls([folder / name for name in sorted(set(names))])
        single = folder / _SINGLE
        return cls([single] if single.is_file() else sorted(folder.glob("*.safetensors")))

    @property
    def layout(self) -> Layout:
        """Return the whole tensors, on the meta device."""
        found: dict[str, Any] = dict(self._metadata.state_dict_metadata)
        return {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
            for name, tensor in found.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        found: Any = self._metadata.state_dict_metadata[name]
        whole = torch.empty(found.size, dtype=found.properties.dtype)
        storage: Any = self._metadata.storage_data
        for chunk in found.chunks:
            part = whole
            for dim, (begin, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                part = part.narrow(dim, begin, length)
            with safe_open(storage[MetadataIndex(name, chunk.offsets)].relative_path, "pt") as file:
                part.copy_(file.get_tensor(name))
        return whole

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, converted to their dtype; of a sharded one only the local part is read."""
        # torch wraps what goes wrong in a class that is no Exception, and warns that ranks do not talk.
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                dcp.load(dict(tensors), storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from error


class _Chosen(FileSystem):
    """Lists these files for torch's reader, which would take all of a folder."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [str(file) for file in files]

    def ls(self, path: object) -> list[str]:  # noqa: ARG002
        return self._files


def describe(tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> Layout:
    """Return the layout of whole tensors; floating-point ones get `dtype`."""
    return {
        name: torch.empty(
            tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype, device="meta"
        )
        for name, tensor in tensors.items()
    }

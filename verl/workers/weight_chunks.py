"""Deal weights to chunks of one buffer: which tensors lie in it at the same time, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.workers.tensor_files import Layout

BUFFER_BYTES = 1_250_000_000
"""More than the embedding of 7 billion parameters in bfloat16, which has 1.09 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tensors that lie in the buffer one after the other, without gaps."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    """In bytes."""

    def views(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor as a view of the buffer, a flat one of bytes."""
        begin = 0
        for name, dtype, shape, size in zip(self.names, self.dtypes, self.shapes, self.sizes, strict=True):
            yield name, buffer[begin : begin + size].view(dtype).view(shape)
            begin += size


def buffer_size(layout: Layout, *, preferred: int) -> int:
    """Return the bytes of a buffer: `preferred`, more for a larger tensor, less for a smaller model."""
    sizes = [tensor.nbytes for tensor in layout.values()]
    return min(sum(sizes), max(preferred, *sizes))


def order_weights(layout: Layout) -> list[str]:
    """Return the names of what is sent: wider numbers first, so that each lies aligned in what is packed."""
    return sorted((name for name in layout if layout[name].numel()), key=lambda name: -layout[name].itemsize)


def plan_chunks(layout: Layout, *, buffer_bytes: int) -> list[Chunk]:
    """Deal all tensors to chunks, in order, those of wider numbers first, so that each lies aligned.

    No tensor is split. Raises ValueError for one that is larger than the buffer.
    """
    chunks: list[list[str]] = []
    used = buffer_bytes  # no chunk has room yet
    for name in order_weights(layout):
        size = layout[name].nbytes
        if size > buffer_bytes:
            raise ValueError(f"{name} has {size} bytes, more than the buffer of {buffer_bytes}")
        if used + size > buffer_bytes:
            chunks.append([])
            used = 0
        chunks[-1].append(name)
        used += size
    return [_make_chunk(layout, names) for names in chunks]


def _make_chunk(layout: Layout, names: list[str]) -> Chunk:
    tensors = [layout[name] for name in names]
    return Chunk(
        names=tuple(names),
        dtypes=tuple(tensor.dtype for tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        sizes=tuple(tensor.nbytes for tensor in tensors),
    )

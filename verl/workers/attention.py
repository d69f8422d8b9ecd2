"""Attention over a forest (see `verl.forest`): SDPA in some calls, or FlashAttention for all blocks at once.

Both functions have the signature of transformers' `AttentionInterface`, and `blocks` as a further argument of
the decoder, which hands it down to its layers. They attend to the whole context: models whose layers do not
run row by row, see `verl.workers.model.packs_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from verl.forest import Forest, merge_blocks
from verl.types import IntArray

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments by which layers ask for another attention than the one computed here; so is a window."""


class AttentionBlocks:
    """The S blocks of a forest, on the device of the model, as each kernel needs them."""

    def __init__(self, forest: Forest, *, device: torch.device) -> None:
        self.longest_key = int(forest.key_lengths.max())
        self._forest = forest
        self._device = device

    @cached_property
    def sdpa(self) -> SdpaCalls:
        """Return the calls of SDPA; made once, for all layers and passes."""
        return SdpaCalls(self._forest, device=self._device)

    @cached_property
    def varlen(self) -> VarlenBlocks:
        """Return the blocks as one call computes them."""
        return VarlenBlocks(self._forest, device=self._device)


class SdpaCalls:
    """How SDPA computes a forest: a call for each block, or for several that share most of their keys."""

    def __init__(self, forest: Forest, *, device: torch.device) -> None:
        merged = merge_blocks(forest)
        self.query_lengths = [blocks.num_queries for blocks in merged]
        self.key_lengths = [len(blocks.keys) for blocks in merged]
        self.masks = [
            None if blocks.mask is None else torch.tensor(blocks.mask, device=device) for blocks in merged
        ]
        """Which keys the queries of each call attend to [queries, keys]; None: those up to itself."""
        self.columns: Tensor | None = None
        """Of the keys, call after call; None: they are in this order."""
        if forest.keys is not None:
            self.columns = torch.tensor(np.concatenate([blocks.keys for blocks in merged]), device=device)


class VarlenBlocks:
    """How FlashAttention computes a forest."""

    def __init__(self, forest: Forest, *, device: torch.device) -> None:
        self.longest_query = int(forest.query_lengths.max())
        self.query_borders = _borders(forest.query_lengths, device=device)
        self.key_borders = _borders(forest.key_lengths, device=device)
        """Where each block begins and the last one ends [S + 1]."""
        self.columns = None if forest.keys is None else torch.tensor(forest.keys, device=device)
        """Of the keys, block after block; None: they are in this order."""


def _gather(keys: Tensor, columns: Tensor | None) -> Tensor:
    """Return these columns of keys or values: [1, heads, T, D] as [1, heads, len(columns), D]."""
    return keys if columns is None else keys.index_select(2, columns)


def attend_by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    *,
    blocks: AttentionBlocks,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Return the attention of queries [1, heads, T, D] as [1, T, heads, D]. Raises ValueError."""
    _check(module, settings, blocks=blocks)
    calls = blocks.sdpa
    key, value = _gather(key, calls.columns), _gather(value, calls.columns)
    if (num_queries := query.shape[1] // key.shape[1]) > 1:  # query heads for each of keys
        key, value = (x.repeat_interleave(num_queries, 1) for x in (key, value))
    parts = [
        scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        for q, k, v, mask in zip(
            query.split(calls.query_lengths, 2),
            key.split(calls.key_lengths, 2),
            value.split(calls.key_lengths, 2),
            calls.masks,
            strict=True,
        )
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def attend_by_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    *,
    blocks: AttentionBlocks,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Return the same by torch's own FlashAttention-2, which needs a GPU and 16 bits. Raises ValueError."""
    from torch.nn.attention.varlen import varlen_attn

    _check(module, settings, blocks=blocks)
    result = varlen_attn(**varlen_arguments(query, key, value, blocks=blocks), scale=scaling)
    return result.unsqueeze(0), None


def varlen_arguments(query: Tensor, key: Tensor, value: Tensor, *, blocks: AttentionBlocks) -> dict[str, Any]:
    """Return the arguments of `varlen_attn` for heads [1, heads, T, D], of which it makes [T, heads, D].

    Causal attention there is aligned at the end: the last query of a block is that of its last key.
    """
    layout = blocks.varlen
    key, value = _gather(key, layout.columns), _gather(value, layout.columns)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seq_q": layout.query_borders,
        "cu_seq_k": layout.key_borders,
        "max_q": layout.longest_query,
        "max_k": blocks.longest_key,
        "window_size": (-1, 0),
        "enable_gqa": True,
    }


def _borders(lengths: IntArray, *, device: torch.device) -> Tensor:
    return torch.tensor(np.append(0, lengths.cumsum()), dtype=torch.int32, device=device)


def _check(module: nn.Module, settings: Mapping[str, Any], *, blocks: AttentionBlocks) -> None:
    """Raise ValueError where a layer asks for an attention that would silently not be computed."""
    asked = {name: settings[name] for name in _UNSUPPORTED if settings.get(name) is not None}
    window = settings.get("sliding_window")
    if window is not None and window < blocks.longest_key:
        asked["sliding_window"] = window
    if asked:
        raise ValueError(
            f"{type(module).__name__} asks for attention with {asked}, which is not supported: take a model "
            "with plain attention to the whole context"
        )

"""Exact search with torch alone: blocks of vectors times all queries, and a running list of the best."""

from __future__ import annotations

import torch

_BLOCK_ROWS = 1 << 18


class Best:
    """The best candidates so far, for each query."""

    def __init__(self, num_queries: int, *, count: int, device: torch.device | str = "cpu") -> None:
        self._count = count
        self._scores = torch.full((num_queries, 0), -torch.inf, device=device)
        self._rows = torch.empty((num_queries, 0), dtype=torch.int64, device=device)

    def offer(self, scores: torch.Tensor, *, first_row: int) -> None:
        """Merge scores [queries, rows] of consecutive rows."""
        best, rows = scores.topk(min(self._count, scores.shape[1]), dim=1)
        merged = torch.cat([self._scores, best.float()], dim=1)
        merged_rows = torch.cat([self._rows, rows + first_row], dim=1)
        self._scores, kept = merged.topk(min(self._count, merged.shape[1]), dim=1)
        self._rows = merged_rows.gather(1, kept)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and rows, on the CPU."""
        return self._scores.cpu(), self._rows.cpu()


def scan(vectors: torch.Tensor, queries: torch.Tensor, *, best: Best, first_row: int = 0) -> None:
    """Offer the scores of float16 vectors [rows, dim] for float16 queries [n, dim].

    `first_row` is the number of the first vector. Returns before a GPU is done.
    """
    for start in range(0, len(vectors), _BLOCK_ROWS):
        scores = _multiply_half(queries, vectors[start : start + _BLOCK_ROWS])
        best.offer(scores, first_row=first_row + start)


def _multiply_half(queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Return float32 scores of float16 inputs: in float16 the scores of near neighbors are equal."""
    if block.is_cuda:
        return torch.mm(queries, block.T, out_dtype=torch.float32)
    return queries.float() @ block.float().T

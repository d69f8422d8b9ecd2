"""What the server asks of a retriever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from search_r1.search.schema import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One search result."""

    document: Document
    score: float


class Retriever(Protocol):
    """Find passages. Called from one thread at a time."""

    def __len__(self) -> int:
        """Passages in the corpus."""
        ...

    def search(self, queries: Sequence[str], *, topk: int) -> list[list[Hit]]:
        """One list per query, best first, at most `topk` long, empty when nothing was found."""
        ...

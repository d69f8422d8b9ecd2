"""The row of a passage by its id, for corpora of any size.

Where every id is the number of its row, as in wiki-18, no table is needed. Otherwise a sorted table of 64-bit
hashes and rows, 16 bytes per passage, is made once and memory-mapped (sidecar.py).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import numpy as np

from search_r1.search.corpus import Corpus
from search_r1.search.errors import RetrieverError
from search_r1.search.files import WatchedFile
from search_r1.search.sidecar import Entries, keep_table


class IdTable:
    """Finds rows by id. Opening it reads the whole corpus the first time, about 9 microseconds a passage."""

    def __init__(self, corpus: Corpus, *, stop: threading.Event) -> None:
        """Raise RetrieverError when a passage is malformed, or when `stop` is set meanwhile."""
        self._corpus = corpus
        table, sidecar = keep_table(
            corpus.path,
            kind="ids",
            fingerprint=corpus.fingerprint,
            make=lambda: _make_table(corpus, stop),
            is_whole=lambda table: len(table) in (0, 2 * len(corpus)),
        )
        self._file = None if sidecar is None else WatchedFile(sidecar, size_only=True)
        # The hashes in ascending order, then the row of each; empty where every id is its row's number.
        self._hashes, self._rows = table[: len(table) // 2], table[len(table) // 2 :]

    def find(self, passage_id: str) -> int | None:
        """Return the row of a passage, the first one if several have this id; None for an unknown id."""
        if self._file is not None:
            self._file.check()
        key = _hash(passage_id)
        for place in range(int(np.searchsorted(self._hashes, key)), len(self._hashes)):
            if self._hashes[place] != key:
                break
            row = int(self._rows[place])
            if self._corpus[row].id == passage_id:
                return row
        return None

    def close(self) -> None:
        """Close the file of the table."""
        if self._file is not None:
            self._file.close()


def find_numbered_row(corpus: Corpus, passage_id: str) -> int | None:
    """Return the row whose number is the id of its passage; None where there is no such row.

    This needs no table.
    """
    if not (passage_id.isascii() and passage_id.isdecimal()) or len(passage_id) > len(str(len(corpus))):
        return None
    row = int(passage_id)
    return row if row < len(corpus) and corpus[row].id == passage_id else None


def _make_table(corpus: Corpus, stop: threading.Event) -> Iterator[Entries]:
    """Yield the sorted hashes, then their rows; nothing where every id is the number of its row."""
    hashes: Entries | None = None
    for row, passage in enumerate(corpus):
        if stop.is_set():
            raise RetrieverError("the server is shutting down")
        if hashes is None and passage.id != str(row):
            hashes = np.empty(len(corpus), dtype=np.int64)
            hashes[:row] = [_hash(str(number)) for number in range(row)]
        if hashes is not None:
            hashes[row] = _hash(passage.id)
    if hashes is not None:
        order = np.argsort(hashes, kind="stable")  # equal ids in the order of their rows
        yield hashes[order]
        yield order.astype(np.int64)


def _hash(passage_id: str) -> int:
    digest = hashlib.blake2b(passage_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)

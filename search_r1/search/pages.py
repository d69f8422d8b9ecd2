"""Whole pages of a corpus, in parts.

A corpus has passages, such as wiki-18's of 100 words. A page is all consecutive passages with the same title,
the first line of their contents, in the order of the corpus. A passage without a title is a page of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from search_r1.search.corpus import Corpus, open_corpus
from search_r1.search.id_table import IdTable, find_numbered_row
from search_r1.search.schema import Document, Page, PagePassage

MAX_PASSAGES = 4096
"""More consecutive passages with one title are no page but a corpus with poor titles: each stands alone."""


class PageReader:
    """Reads pages of one corpus in a thread of its own, so that searches go on meanwhile."""

    def __init__(self, corpus_path: Path) -> None:
        """Open nothing; the first page that is read does."""
        self._path = corpus_path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pages")
        self._corpus: Corpus | None = None
        self._table: IdTable | None = None
        self._stop = threading.Event()

    async def read(self, passage_id: str, *, part: int, part_chars: int) -> Page | None:
        """Return a part of the page with this passage; None for an unknown id.

        The first id that is not the number of its row makes the table of ids, which reads the corpus once.
        Raises RetrieverError.
        """

        def find() -> Page | None:
            passages = self._find_page(passage_id)
            return None if passages is None else cut_page(passages, part=part, part_chars=part_chars)

        return await asyncio.get_running_loop().run_in_executor(self._thread, find)

    async def aclose(self) -> None:
        """Wait for the page that is read, end the making of a table, and close the corpus."""
        self._stop.set()
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        for opened in (self._table, self._corpus):
            if opened is not None:
                opened.close()

    def _find_page(self, passage_id: str) -> list[Document] | None:
        if self._corpus is None:
            self._corpus = open_corpus(self._path)
        corpus = self._corpus
        if (row := find_numbered_row(corpus, passage_id)) is None:
            if self._table is None:
                self._table = IdTable(corpus, stop=self._stop)
            row = self._table.find(passage_id)
        return None if row is None else list_page(row, read=corpus.__getitem__, num_rows=len(corpus))


def list_page(row: int, *, read: Callable[[int], Document], num_rows: int) -> list[Document]:
    """Return the passages of the page that row `row` is on, in order."""
    own = read(row)
    if not own.title:
        return [own]
    before: list[Document] = []
    after: list[Document] = []
    for found, rows in ((before, range(row - 1, -1, -1)), (after, range(row + 1, num_rows))):
        for number in rows:
            passage = read(number)
            if passage.title != own.title:
                break
            found.append(passage)
            if len(before) + len(after) >= MAX_PASSAGES:
                return [own]
    return [*reversed(before), own, *after]


def cut_page(passages: Sequence[Document], *, part: int, part_chars: int) -> Page:
    """Return part `part`, from 1, of the page of these passages; without passages if there is no such part.

    The texts are joined by spaces and cut at blanks, so that a part has at most `part_chars` characters and
    each piece of it belongs to one passage.
    """
    texts = [(passage.id, text) for passage in passages if (text := passage.text.strip())]
    whole = " ".join(text for _, text in texts)
    ranges = _cut(whole, part_chars)
    pieces: list[PagePassage] = []
    if part <= len(ranges):
        first, last = ranges[part - 1]
        start = 0
        for passage_id, text in texts:
            end = start + len(text)
            if max(start, first) < min(end, last):
                piece = whole[max(start, first) : min(end, last)]
                pieces.append(PagePassage(id=passage_id, text=piece))
            start = end + 1
    return Page(title=passages[0].title, part=part, num_parts=max(1, len(ranges)), passages=pieces)


def _cut(text: str, size: int) -> list[tuple[int, int]]:
    """Return the ranges of a stripped text that are the parts: at most `size` long, without blanks around."""
    ranges: list[tuple[int, int]] = []
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text) and not text[end].isspace():
            # Back to the last blank; a word that is longer than a part is cut.
            end = next((k for k in range(end - 1, start, -1) if text[k].isspace()), end)
        last = start + len(text[start:end].rstrip())
        ranges.append((start, last))
        start = end
        while start < len(text) and text[start].isspace():
            start += 1
    return ranges

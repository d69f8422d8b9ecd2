"""Whether a corpus holds the evidence for answers: by one pass over it, or by asking a server for ids."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from search_r1.search.corpus import open_corpus
from search_r1.search.progress import PhaseProgress
from search_r1.search.remote import RemoteRetriever
from search_r1.search.schema import MIN_PART_CHARS
from serving.answers import AnswerRule, normalize_answer, split_words
from serving.evidence import Evidence, EvidenceKind, title_of
from serving.http import WITHOUT_ROUTE, CallError
from serving.redaction import redact_text

logger = logging.getLogger(__name__)

Held: TypeAlias = dict[int, list[bool | None]]
"""For each question, by its row, whether the corpus has each item of its evidence; None: not known."""
_PER_REPORT = 10_000


def scan_corpus(path: Path, evidence: Mapping[int, Evidence]) -> Held:
    """Read the corpus once and return what it holds; nothing is read if there is nothing to look for.

    Raises RetrieverError when it cannot be read.
    """
    if not evidence:
        return {}
    wanted = {item for one in evidence.values() if not _is_gold(one) for item in one.items}
    answers = _Answers({row: one.golds for row, one in evidence.items() if _is_gold(one)})
    found: set[str] = set()
    corpus = open_corpus(path)
    try:
        with PhaseProgress() as progress:
            for number, passage in enumerate(corpus, start=1):
                found |= wanted & {passage.id, title_of(passage.contents)}
                answers.look_into(passage.contents)
                if number % _PER_REPORT == 0:
                    progress("corpus", number, len(corpus))
    finally:
        corpus.close()
    return {
        row: [answers.holds(row)] if _is_gold(one) else [item in found for item in one.items]
        for row, one in evidence.items()
    }


async def look_up_ids(
    retriever: RemoteRetriever, evidence: Mapping[int, Evidence], *, timeout_s: float
) -> Held:
    """Ask a server of this project for passages by id; titles and gold answers cannot be asked for.

    What could not be looked up is unknown, which a warning says.
    """
    slots = asyncio.Semaphore(retriever.num_parallel_calls)
    failures: list[CallError] = []

    async def is_held(passage_id: str) -> bool | None:
        async with slots:
            try:
                page = await retriever.open_page(
                    passage_id, part=1, part_chars=MIN_PART_CHARS, timeout_s=timeout_s
                )
            except CallError as error:
                if error.status not in WITHOUT_ROUTE:  # of another server, or one without a corpus
                    failures.append(error)
                return None
        return page is not None

    ids = sorted({item for one in evidence.values() if one.names_ids for item in one.items})
    held = dict(zip(ids, await asyncio.gather(*map(is_held, ids)), strict=True))
    if failures:
        logger.warning(
            "%d of %d passages could not be looked up and are unknown, the first because: %s",
            len(failures), len(ids), redact_text(failures[0].message),
        )  # fmt: skip
    return {
        row: [held[item] if one.names_ids else None for item in one.items] for row, one in evidence.items()
    }


def _is_gold(evidence: Evidence) -> bool:
    return evidence.kind is EvidenceKind.GOLD_STRINGS


class _Answers:
    """Gold answers that are looked for in passages, all in one pass over the words of each."""

    def __init__(self, golds: Mapping[int, Sequence[str]]) -> None:
        self._by_first: dict[str, list[tuple[int, list[str]]]] = {}
        self._is_found: dict[int, bool | None] = {}
        for row, of_one in golds.items():
            for gold in of_one:
                # Passages are normalized as a whole: of "A" alone nothing is left to be found in them.
                is_findable = bool(normalize_answer(gold, rule=AnswerRule.published))
                if is_findable and (words := split_words(normalize_answer(gold))):
                    self._by_first.setdefault(words[0], []).append((row, words))
                    self._is_found[row] = False
                else:
                    self._is_found.setdefault(row, None)

    def look_into(self, contents: str) -> None:
        """Look for all answers that were not found so far."""
        if not self._by_first:
            return
        words = split_words(normalize_answer(contents))
        for start, word in enumerate(words):
            for row, wanted in self._by_first.get(word, ()):
                if not self._is_found[row] and words[start : start + len(wanted)] == wanted:
                    self._is_found[row] = True

    def holds(self, row: int) -> bool | None:
        """Return whether an answer to this question was found; None where none can be looked for."""
        return self._is_found[row]

"""`index audit`: whether the evidence for each answer is in the corpus and can be retrieved, before training.

    index audit --questions data/nq_hotpotqa/train.parquet --url http://127.0.0.1:8000 --output audit.jsonl
    index audit --questions mine.jsonl --index_path e5_Flat.index --corpus_path wiki-18.jsonl

The evidence of a question is its supporting passages (`extra_info.supporting_ids`, ids or titles), else any
passage in which a gold answer occurs; each line says which. Two searches tell how far the retriever gives it:
one for the question as it is, and for what that does not find one for the passage's own text (of gold
answers: question and answer), which no query of an agent is likely to beat.

    found         all evidence is in the first k passages for the question
    reachable     the rest is in the first k passages for its own text: it takes other queries
    out of reach  some is in the corpus, but not in the first k passages for its own text
    missing       some is not in the corpus
    unknown       there is no evidence to look for, a search failed, or the corpus could not be looked up
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_r1.search.asking import (
    AskedQuestion,
    add_asking_arguments,
    by_source,
    check_asking,
    check_depth,
    format_share,
    open_asked,
    prepare_output,
    read_questions,
    search_all,
    wilson_share,
)
from search_r1.search.errors import RetrieverError
from search_r1.search.presence import Held, look_up_ids, scan_corpus
from search_r1.search.remote import RemoteRetriever
from search_r1.search.retriever import Outcome, Retriever, SearchFailure
from search_r1.search.settings import resolve_retriever
from serving.evidence import Evidence, EvidenceKind, find_corpus_hash
from serving.files import replacing_file, sha256_of_file
from serving.redaction import redact_text


class Status(StrEnum):
    """See the head of this file."""

    FOUND = "found"
    REACHABLE = "reachable"
    OUT_OF_REACH = "out of reach"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedItem:
    """One passage of the evidence, or the gold answers."""

    id: str
    in_corpus: bool | None = None
    """None where it is not known."""
    rank: int | None = None
    """In the results for the question, from 1; None beyond the depth of the search."""
    own_rank: int | None = None
    """In the results for its own text, where the question did not find it in the first k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedQuestion:
    """What is known of one question."""

    question: AskedQuestion
    evidence: Evidence
    items: tuple[AuditedItem, ...]
    failure: str | None = None
    """Of a search: then nothing else is known."""

    def status(self, k: int) -> Status:
        """Return how far the retriever gives the evidence in the first `k` passages."""
        if any(item.in_corpus is False for item in self.items):
            return Status.MISSING
        if self.failure is not None or not self.items or any(item.in_corpus is None for item in self.items):
            return Status.UNKNOWN
        if all(_is_within(item.rank, k) for item in self.items):
            return Status.FOUND
        is_reachable = all(_is_within(item.rank, k) or _is_within(item.own_rank, k) for item in self.items)
        return Status.REACHABLE if is_reachable else Status.OUT_OF_REACH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `index audit`, and those of every retriever."""
    add = parser.add_argument
    add("--topk", type=int, default=3, metavar="K", help="passages that the agent reads of a search")
    add("--depth", type=int, default=100, help="how far to look for the evidence; at least --topk")
    add("--output", type=Path, metavar="FILE", help="write one JSON line per question (default: none)")
    add_asking_arguments(parser)


def run(settings: argparse.Namespace) -> int:
    """Audit, print a table and a last line of JSON. 1 when nothing is known. Raises RetrieverError."""
    # Beside a server, the corpus is read here to know what it holds.
    check_asking(settings, allowed_with_url=["corpus_path"])
    for name in ("topk", "depth"):
        check_depth(name, getattr(settings, name))
    if settings.depth < settings.topk:
        raise RetrieverError(f"--depth must be at least --topk ({settings.topk}), got {settings.depth}")
    if settings.output is not None:
        prepare_output(settings.output, flag="--output")
    questions = read_questions(settings.questions, limit=settings.num_questions)
    audited, facts, corpus_sha256 = asyncio.run(_audit(questions, settings))
    k = settings.topk
    Console(file=sys.stdout).print(_make_table(audited, k))
    if settings.output is not None:
        write_lines(audited, settings.output, k=k, corpus_sha256=corpus_sha256)
    summary = {
        "topk": k,
        "depth": settings.depth,
        **_summarize(audited, k),
        "by_source": {source: _summarize(part, k) for source, part in by_source(audited).items()},
        "retriever": facts,
    }
    sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")
    return 1 if all(one.status(k) is Status.UNKNOWN for one in audited) else 0


async def _audit(
    questions: Sequence[AskedQuestion], settings: argparse.Namespace
) -> tuple[list[AuditedQuestion], dict[str, object], str | None]:
    """Return what is known of each question, what that depends on, and the hash of the corpus.

    Raises RetrieverError.
    """
    async with open_asked(settings) as (retriever, facts):
        corpus_sha256 = find_corpus_hash(facts)
        if settings.url is not None and "corpus_path" in settings:
            corpus_sha256 = await asyncio.to_thread(hash_corpus, Path(settings.corpus_path), corpus_sha256)
        audited = await _search_questions(questions, retriever, settings)
        audited = await _search_own_texts(audited, retriever, settings)
        unresolved = {
            row: one.evidence
            for row, one in enumerate(audited)
            if one.failure is None and any(item.in_corpus is None for item in one.items)
        }
        held: Held = {}
        if settings.url is None or "corpus_path" in settings:
            retrieves = resolve_retriever(settings)
            if "corpus_path" in settings or not retrieves.is_online:  # an online engine has no corpus
                held = await asyncio.to_thread(scan_corpus, retrieves.dense.corpus_path, unresolved)
        elif isinstance(retriever, RemoteRetriever):
            held = await look_up_ids(retriever, unresolved, timeout_s=settings.timeout_s)
    resolved = [_resolve(one, held[row]) if row in held else one for row, one in enumerate(audited)]
    return resolved, facts, corpus_sha256


def hash_corpus(path: Path, searched: str | None) -> str:
    """Return the SHA-256 of the file. Raises RetrieverError if the server searches another corpus."""
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise RetrieverError(f"--corpus_path {path}: {error.strerror or error}") from error
    if searched not in (None, found):
        raise RetrieverError(
            f"--corpus_path {path} has the SHA-256 {found[:12]}, the server at --url searches a corpus with "
            f"{searched[:12]}: give the corpus of its index"
        )
    return found


async def _search_questions(
    questions: Sequence[AskedQuestion], retriever: Retriever, settings: argparse.Namespace
) -> list[AuditedQuestion]:
    def audit(question: AskedQuestion, outcome: Outcome) -> AuditedQuestion:
        evidence = Evidence.of(
            supporting_ids=question.supporting_ids,
            supporting_texts=question.supporting_texts,
            golds=question.golds,
        )
        failure, ranks = find_ranks(evidence, outcome)
        pairs = zip(evidence.items, ranks, strict=True)
        items = tuple(
            AuditedItem(id=name, rank=rank, in_corpus=True if rank else None) for name, rank in pairs
        )
        return AuditedQuestion(question=question, evidence=evidence, items=items, failure=failure)

    return await search_all(
        questions,
        retriever,
        settings=settings,
        topk=settings.depth,
        query=lambda question: question.text,
        answer=audit,
        phase="questions",
    )


async def _search_own_texts(
    audited: Sequence[AuditedQuestion], retriever: Retriever, settings: argparse.Namespace
) -> list[AuditedQuestion]:
    """Search for the own text of every item that the question does not find in the first k."""
    lost = [
        (row, number)
        for row, one in enumerate(audited)
        for number, item in enumerate(one.items)
        if one.failure is None and not _is_within(item.rank, settings.topk)
    ]

    def query(place: tuple[int, int]) -> str:
        row, number = place
        return audited[row].evidence.best_queries(audited[row].question.text)[number]

    def answer(place: tuple[int, int], outcome: Outcome) -> tuple[str | None, int | None]:
        row, number = place
        failure, ranks = find_ranks(audited[row].evidence, outcome)
        return failure, ranks[number]

    answers = await search_all(
        lost, retriever, settings=settings, topk=settings.depth, query=query, answer=answer, phase="own texts"
    )
    updated = list(audited)
    for (row, number), (failure, rank) in zip(lost, answers, strict=True):
        one = updated[row]
        item = replace(one.items[number], own_rank=rank)
        item = replace(item, in_corpus=True) if rank is not None else item
        items = (*one.items[:number], item, *one.items[number + 1 :])
        updated[row] = replace(one, items=items, failure=one.failure or failure)
    return updated


def find_ranks(evidence: Evidence, outcome: Outcome) -> tuple[str | None, list[int | None]]:
    """Return the failure of a search, and the rank of each item of the evidence from 1."""
    if isinstance(outcome, SearchFailure):
        return f"{outcome.kind}: {outcome.reason}", [None] * len(evidence.items)
    found = evidence.find([(hit.document.id, hit.document.contents) for hit in outcome])
    return None, [None if index is None else index + 1 for index in found]


def _resolve(one: AuditedQuestion, held: Sequence[bool | None]) -> AuditedQuestion:
    pairs = zip(one.items, held, strict=True)
    items = (replace(item, in_corpus=known) if item.in_corpus is None else item for item, known in pairs)
    return replace(one, items=tuple(items))


def _is_within(rank: int | None, k: int) -> bool:
    return rank is not None and rank <= k


def write_lines(audited: Iterable[AuditedQuestion], path: Path, *, k: int, corpus_sha256: str | None) -> None:
    """Write one JSON line per question. Raises RetrieverError."""
    try:
        with replacing_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            for one in audited:
                line = {
                    "uid": one.question.uid,
                    "data_source": one.question.data_source,
                    "question": one.question.text,
                    "evidence": str(one.evidence.kind),
                    "status": str(one.status(k)),
                    "items": [asdict(item) for item in one.items],
                    "failure": None if one.failure is None else redact_text(one.failure),
                    "corpus_sha256": corpus_sha256,
                }
                file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise RetrieverError(f"--output {path}: {error.strerror or error}") from error


def _summarize(audited: Sequence[AuditedQuestion], k: int) -> dict[str, object]:
    statuses = Counter(one.status(k) for one in audited)
    kinds = Counter(one.evidence.kind for one in audited)
    return {
        "questions": len(audited),
        "evidence": {str(kind): kinds[kind] for kind in EvidenceKind},
        "status": {str(status): statuses[status] for status in Status},
        "failed": sum(one.failure is not None for one in audited),
    }


def _make_table(audited: Sequence[AuditedQuestion], k: int) -> Table:
    """Make a row per data source and one for all; shares are of the questions whose status is known."""
    table = Table(
        title=f"Evidence for the answers in the first {k} passages, intervals of 95 %",
        title_justify="left",
        caption=f"found: by the question; reachable: by its own text; evidence by {_name_kinds(audited)}",
        caption_justify="left",
    )
    table.add_column("data source", overflow="fold")
    for name in ("questions", *Status):
        table.add_column(str(name), justify="right")
    parts = by_source(audited)
    for name, part in (parts | ({"all": list(audited)} if len(parts) > 1 else {})).items():
        counts = Counter(one.status(k) for one in part)
        num_known = len(part) - counts[Status.UNKNOWN]
        known = [status for status in Status if status is not Status.UNKNOWN]
        shares = [wilson_share(counts[status], num_known) if num_known else None for status in known]
        cells = (name, str(len(part)), *map(format_share, shares), str(counts[Status.UNKNOWN]))
        # A name from a file may hold what rich would take for markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _name_kinds(audited: Sequence[AuditedQuestion]) -> str:
    counts = Counter(one.evidence.kind for one in audited)
    return ", ".join(f"{kind} ({count})" for kind, count in counts.most_common())

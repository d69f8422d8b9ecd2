"""`evidence.jsonl`: of each answer, where the evidence for the right one was to be found.

One line per line of `results.jsonl`, in the same order. Queries of wrong answers are searched again, deeper
than the policy read, which separates what was cut from what was not retrieved.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from serving.evidence import Evidence, EvidenceKind
from serving.files import replacing_file
from serving.http import WITHOUT_ROUTE
from serving.redaction import redact_text
from verl.errors import DataError, ServiceError
from verl.evaluation.audit import Audit
from verl.evaluation.metrics import is_right
from verl.evaluation.records import EVIDENCE_FILE, TRAJECTORIES_FILE, Key, ResultRecord
from verl.protocols import Search
from verl.run.records import TrajectoryRecord, TurnRecord, count_calls, iterate_records
from verl.types import Question
from verl.utils.files import parse_json
from verl.utils.logs import ProgressLog

logger = logging.getLogger(__name__)

_FORMAT = 1
_CHUNK = 256
"""Trajectories in memory at a time."""
_MAX_CONCURRENT = 32
_PART_CHARS = 100
_TIMEOUT_S = 30.0

Ranks = list[int | None]
"""Of each item of the evidence, from 1; None: not among the results."""


class EvidenceRecord(TypedDict):
    """The evidence for one answer. All lists have one entry per item."""

    format: int
    uid: str
    sample: int
    kind: str
    """See `serving.evidence.EvidenceKind`."""
    items: list[str]
    """Ids or titles of supporting passages, or a gold answer."""
    last_action: str | None
    """answer, tool or invalid: that of the last turn; None without a turn."""
    read: list[bool]
    """Whether the policy read it, whole."""
    question_ranks: Ranks
    """Among the results for the question itself."""
    query_ranks: Ranks
    """The best one among the results for the queries of a wrong answer."""
    in_corpus: list[bool | None]
    """None where it is not known."""
    topk: int
    """Passages that the policy was shown of a search."""
    depth: int | None
    """Passages looked at of each search; None if nothing was searched."""
    failure: str | None
    """Why ranks, or what the corpus has, are unknown."""
    audit: NotRequired[str]
    """SHA-256 of the output of `index audit` that says what the corpus has, if one was given."""


_SHAPE = TypeAdapter(EvidenceRecord)


def read_evidence(folder: Path, results: Sequence[ResultRecord]) -> list[EvidenceRecord] | None:
    """Return the evidence of all answers; None if there is none, or of earlier answers. Raises DataError."""
    path = folder / EVIDENCE_FILE
    if not path.is_file():
        return None
    with path.open("rb") as file:
        found = [
            parse_json(line, shape=_SHAPE, where=f"{path}:{number}", fix="remove the file, evaluate again")
            for number, line in enumerate(file, start=1)
        ]
    keys = [(record["uid"], record["sample"]) for record in found]
    return found if keys == [(result["uid"], result["sample"]) for result in results] else None


async def write_evidence(
    folder: Path,
    results: Sequence[ResultRecord],
    *,
    questions: Sequence[Question],
    search: Search | None,
    topk: int,
    depth: int | None,
    audit: Audit | None = None,
) -> None:
    """Find the evidence of all answers, and write it to the folder.

    `search` returns `depth` passages; None: nothing is searched again. A search that fails is recorded; only
    such records are made again if the file is there already and of the same `audit`. Raises DataError for
    damaged trajectories.
    """
    finder = _Finder({q.uid: q for q in questions}, search=search, topk=topk, depth=depth, audit=audit)
    trajectories = iterate_records(folder / TRAJECTORIES_FILE)
    progress = ProgressLog(logger, "searches for the evidence of answers")
    num_failed = 0
    earlier = read_evidence(folder, results) or []
    known = {(record["uid"], record["sample"]): record for record in earlier if _is_final(record, audit)}
    with replacing_file(folder / EVIDENCE_FILE) as partial, partial.open("w", encoding="utf-8") as file:
        for start in range(0, len(results), _CHUNK):
            chunk = results[start : start + _CHUNK]
            pairs = list(zip(chunk, islice(trajectories, len(chunk)), strict=False))
            _check_pairs(pairs, expected=len(chunk), folder=folder)
            new = [pair for pair in pairs if _key(pair[0]) not in known]
            found = await asyncio.gather(*(finder.find(*pair) for pair in new))
            known |= {(record["uid"], record["sample"]): record for record in found}
            for record in (known.pop(_key(result)) for result in chunk):
                num_failed += record["failure"] is not None
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            progress(start + len(chunk), len(results))
    if num_failed:
        logger.warning(
            "the evidence for %d of %d answers could not be searched: check the retriever, then start the "
            "same command, which searches for it again",
            num_failed,
            len(results),
        )


def is_complete(folder: Path, results: Sequence[ResultRecord], *, audit: Audit | None = None) -> bool:
    """Return whether the folder has the evidence of all these answers, by this audit and none that failed."""
    found = read_evidence(folder, results)
    return found is not None and all(_is_final(record, audit) for record in found)


def _is_final(record: EvidenceRecord, audit: Audit | None) -> bool:
    return record["failure"] is None and record.get("audit") == (None if audit is None else audit.sha256)


def _key(result: ResultRecord) -> Key:
    return result["uid"], result["sample"]


def _check_pairs(
    pairs: Sequence[tuple[ResultRecord, TrajectoryRecord]], *, expected: int, folder: Path
) -> None:
    for result, trajectory in pairs:
        if (result["uid"], result["sample"]) != (trajectory["uid"], trajectory["sample"]):
            raise DataError(
                f"{folder / TRAJECTORIES_FILE} is not in the order of the results, evaluate again"
            )
    if len(pairs) != expected:
        raise DataError(f"{folder / TRAJECTORIES_FILE} has fewer lines than the results; evaluate again")


class _Finder:
    """Looks for the evidence of answers; the searches of all of them share one limit."""

    def __init__(
        self,
        questions: Mapping[str, Question],
        *,
        search: Search | None,
        topk: int,
        depth: int | None,
        audit: Audit | None,
    ) -> None:
        self._questions = questions
        self._search = search
        self._topk = topk
        self._depth = None if search is None else depth
        self._audit = audit
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)
        self._by_question: dict[str, asyncio.Task[Ranks]] = {}

    async def find(self, result: ResultRecord, trajectory: TrajectoryRecord) -> EvidenceRecord:
        """Return the evidence of one answer."""
        question = self._questions[result["uid"]]
        evidence = Evidence.of(
            supporting_ids=question.supporting_ids,
            supporting_texts=question.supporting_texts,
            golds=question.golds,
        )
        turns = trajectory["turns"]
        nothing: Ranks = [None] * len(evidence.items)
        record: EvidenceRecord = {
            "format": _FORMAT,
            "uid": result["uid"],
            "sample": result["sample"],
            "kind": str(evidence.kind),
            "items": list(evidence.items),
            "last_action": turns[-1]["action"]["kind"] if turns else None,
            "read": find_read(evidence, turns),
            "question_ranks": nothing,
            "query_ranks": nothing,
            "in_corpus": [None] * len(evidence.items),
            "topk": self._topk,
            "depth": self._depth,
            "failure": None,
        }
        if self._audit is not None:
            record["audit"] = self._audit.sha256
            record["in_corpus"] = list(self._audit.in_corpus[question.uid])
        if self._search is None or not evidence.items:
            return record
        try:
            record["question_ranks"] = await self._rank_by_question(question, evidence)
            if result["failure"] is None and not is_right(result) and not all(record["read"]):
                queries = list_queries(turns)
                ranks = await asyncio.gather(*(self._rank(evidence, query) for query in queries))
                record["query_ranks"] = best_ranks([nothing, *ranks])
            seen = best_ranks([record["question_ranks"], record["query_ranks"]])
            is_seen = [read or rank is not None for read, rank in zip(record["read"], seen, strict=True)]
            known = [True if seen else held for seen, held in zip(is_seen, record["in_corpus"], strict=True)]
            record["in_corpus"] = await self._look_up(question, evidence, known)
        except ServiceError as error:
            record["failure"] = redact_text(str(error))
        return record

    async def _rank_by_question(self, question: Question, evidence: Evidence) -> Ranks:
        """Return the ranks for the question itself, searched once for all of its samples."""
        if question.uid not in self._by_question:
            self._by_question[question.uid] = asyncio.create_task(self._rank(evidence, question.text))
        return await self._by_question[question.uid]

    async def _rank(self, evidence: Evidence, query: str) -> Ranks:
        assert self._search is not None
        async with self._slots:
            passages = await self._search.search(query)
        found = evidence.find([(p.id, join_contents(p.title, p.text)) for p in passages])
        return [None if index is None else index + 1 for index in found]

    async def _look_up(
        self, question: Question, evidence: Evidence, known: Sequence[bool | None]
    ) -> list[bool | None]:
        """Return whether the corpus has each item: known, found by its own text, or unknown to the server."""
        held = list(known)
        queries = evidence.best_queries(question.text)
        for number, item in enumerate(evidence.items):
            if held[number] is None and (await self._rank(evidence, queries[number]))[number] is not None:
                held[number] = True
            if held[number] is None and evidence.names_ids:
                held[number] = await self._is_held(item)
        return held

    async def _is_held(self, passage_id: str) -> bool | None:
        assert self._search is not None
        try:
            async with self._slots:
                page = await self._search.open_page(
                    passage_id, part=1, part_chars=_PART_CHARS, timeout_s=_TIMEOUT_S
                )
        except ServiceError as error:
            if error.status in WITHOUT_ROUTE:  # another server, or an online engine: it has no pages
                return None
            raise
        return page is not None


def find_read(evidence: Evidence, turns: Iterable[TurnRecord]) -> list[bool]:
    """Return for each item whether the policy read it.

    A supporting passage that was cut does not count, nor does a part of one whose text is known.
    """
    if evidence.kind is EvidenceKind.SUPPORTING_IDS:
        passages = [p for turn in turns for p in turn["passages"] if not p.get("is_cut")]
    else:
        passages = [p for turn in turns for p in turn["passages"]]
    whole = dict(zip(evidence.items, evidence.texts, strict=False)) if evidence.names_ids else {}
    contents = [(p["id"], join_contents(p["title"], p["text"])) for p in passages]
    read = [(name, text) for name, text in contents if len(text.strip()) >= len(whole.get(name, "").strip())]
    return [index is not None for index in evidence.find(read)]


def join_contents(title: str, text: str) -> str:
    """Return a passage as it stands in the corpus: the title, if it has one, is the first line."""
    return f"{title}\n{text}" if title else text


def list_queries(turns: Iterable[TurnRecord]) -> list[str]:
    """Return the queries that were searched for, in order."""
    queries: list[str] = []
    for turn in turns:
        for call in turn["action"].get("calls", [])[: count_calls(turn)]:
            if call["tool"] == "search":
                query = call["arguments"].get("query")
                queries += map(str, query) if isinstance(query, list) else [str(query)]
    return list(dict.fromkeys(queries))


def best_ranks(ranks: Sequence[Ranks]) -> Ranks:
    """Return the best rank of each item over several searches, at least one."""
    return [
        min((rank for rank in of_item if rank is not None), default=None)
        for of_item in zip(*ranks, strict=True)
    ]

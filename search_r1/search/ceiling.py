"""`index ceiling`: how often the answer is in the passages that a question finds, before anything is trained.

    index ceiling --questions data/nq_hotpotqa/test.parquet --url http://127.0.0.1:8000
    index ceiling --questions mine.jsonl --index_path e5_Flat.index --corpus_path wiki-18.jsonl

The question itself is the query, as in one search without thinking: an agent that asks better or more than
once can find more, but whoever quotes from these passages cannot be right more often. A query whose search
failed is counted apart: it is neither found nor missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from search_r1.search.answer_ranks import (
    AnswerRank,
    Share,
    by_source,
    measure_ranks,
    share_within,
)
from search_r1.search.defaults import REPOSITORY
from search_r1.search.errors import RetrieverError
from search_r1.search.questions import AskedQuestion, read_questions
from search_r1.search.schema import MAX_TOPK
from search_r1.search.settings import RETRIEVER_SETTINGS, add_retriever_arguments, resolve_retriever
from serving.answers import AnswerRule, normalize_answer

if TYPE_CHECKING:
    from search_r1.search.retriever import Retriever

logger = logging.getLogger(__name__)

_WORLD_QUESTIONS = REPOSITORY / "world" / "test.parquet"
_WHOLE = "all"
_REACH_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command and of every retriever."""
    add = parser.add_argument
    add(
        "--questions",
        type=Path,
        nargs="+",
        default=[_WORLD_QUESTIONS],
        metavar="FILE",
        help="parquet as for training, or JSON with question and golden_answers (default world/test.parquet)",
    )
    add("--url", help="ask this running retriever; without it, one is opened by the flags below")
    add(
        "--answer_rule",
        choices=tuple(map(str, AnswerRule)),
        default=str(AnswerRule.folded),
        help="how answers and passages are normalized: as reward.answer_rule of the trainer (default folded)",
    )
    add("--topk", type=int, nargs="+", default=[1, 3, 10, 100], metavar="K", help="depths to look at")
    add("--num_questions", type=int, metavar="N", help="draw so many of them at random (all if left out)")
    add("--batch_size", type=int, default=64, help="questions searched at once")
    add("--timeout_s", type=float, default=600.0, help="deadline of a batch")
    add("--plot", type=Path, default=Path("runs/ceiling.png"), help="where the picture goes")
    add("--details", type=Path, metavar="FILE", help="write question, golds and rank as JSONL")
    add_retriever_arguments(parser)


def run(settings: argparse.Namespace) -> int:
    """Measure, show, draw; the last line is JSON. 1 when every search failed. Raises RetrieverError."""
    _check(settings)
    started = time.monotonic()
    questions = read_questions(settings.questions, limit=settings.num_questions)
    rule = AnswerRule(settings.answer_rule)
    hopeless = sum(not any(normalize_answer(gold, rule=rule) for gold in q.golds) for q in questions)
    if hopeless:
        logger.warning("%d questions have no answer that exact match can accept: they are missed", hopeless)
    ranks, facts = asyncio.run(_measure(questions, settings))
    ks = sorted(set(settings.topk))
    console = Console(file=sys.stdout)
    console.print(make_table(ranks, ks))
    _explain(ranks, ks)
    _write_details(ranks, settings.details)
    summary = summarise(ranks, ks) | {"retriever": facts}
    if all(ranked.failure is not None for ranked in ranks):
        logger.error("every search failed: there is nothing to draw")
    else:
        _draw(ranks, settings.plot, ks=ks)
        summary["plot"] = str(settings.plot)
    summary["seconds"] = round(time.monotonic() - started, 1)
    sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")
    return 0 if "plot" in summary else 1


def summarise(ranks: Sequence[AnswerRank], ks: Sequence[int]) -> dict[str, object]:
    """What the table says, for programs."""
    known = [ranked.num_found for ranked in ranks if ranked.failure is None]
    return {
        **_summarise_part(ranks, ks),
        "failures": dict(Counter(r.failure.kind.value for r in ranks if r.failure is not None)),
        "passages_mean": round(statistics.fmean(known), 2) if known else None,
        "by_source": {source: _summarise_part(part, ks) for source, part in by_source(ranks).items()},
    }


def make_table(ranks: Sequence[AnswerRank], ks: Sequence[int]) -> Table:
    """A row per data source and one for all, with intervals of 95 %."""
    title = "Questions whose answer is in the passages found, intervals of 95 %"
    table = Table(title=title, title_justify="left")
    table.add_column("data source", overflow="fold")
    for name in ("questions", "failed", *(f"top {k}" for k in ks)):
        table.add_column(name, justify="right")
    parts = by_source(ranks)
    for source, part in parts.items():
        table.add_row(*_cells(source, part, ks))
    if len(parts) > 1:
        table.add_section()
        table.add_row(*_cells(_WHOLE, ranks, ks))
    return table


def _check(settings: argparse.Namespace) -> None:
    for name, value in (("num_questions", settings.num_questions), ("batch_size", settings.batch_size)):
        if value is not None and value < 1:
            raise RetrieverError(f"--{name} must be at least 1, got {value}")
    if not settings.timeout_s > 0:
        raise RetrieverError(f"--timeout_s must be more than 0 seconds, got {settings.timeout_s}")
    for k in settings.topk:
        if not 1 <= k <= MAX_TOPK:
            raise RetrieverError(f"--topk must be in 1..{MAX_TOPK}, got {k}")
    given = [setting.flag for setting in RETRIEVER_SETTINGS if setting.name in settings]
    if settings.url and given:
        raise RetrieverError(
            f"--url asks a running server, which has its own {given[0]}: leave one of them out"
        )


async def _measure(
    questions: Sequence[AskedQuestion], settings: argparse.Namespace
) -> tuple[list[AnswerRank], dict[str, object]]:
    retriever, facts = await _open(settings)
    columns = (TextColumn("searching"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("search", total=len(questions))
            ranks = await measure_ranks(
                questions,
                retriever,
                topk=max(settings.topk),
                rule=AnswerRule(settings.answer_rule),
                batch_size=settings.batch_size,
                timeout_s=settings.timeout_s,
                report=lambda count: progress.advance(task, count),
            )
        return ranks, facts
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        await retriever.aclose()


async def _open(settings: argparse.Namespace) -> tuple[Retriever, dict[str, object]]:
    """The retriever, and what its answers depend on. Raises RetrieverError."""
    if settings.url:
        return await _reach(settings.url)
    from search_r1.search.assemble import open_retriever

    retriever = await open_retriever(resolve_retriever(settings))
    return retriever, dict(retriever.describe())


async def _reach(url: str) -> tuple[Retriever, dict[str, object]]:
    from search_r1.search.remote import RemoteRetriever
    from serving.http import CallError

    try:
        remote = RemoteRetriever(url, token=os.environ.get("RETRIEVER_TOKEN") or None)
    except ValueError as error:
        raise RetrieverError(f"--url: {error}") from error
    try:
        # Also tells early that nobody answers: batches have much longer deadlines.
        described = await remote.fetch_description(timeout_s=_REACH_S)
    except CallError as error:
        await remote.aclose()
        raise RetrieverError(str(error)) from error
    return remote, {**remote.describe(), **(described or {})}


def _summarise_part(ranks: Sequence[AnswerRank], ks: Sequence[int]) -> dict[str, object]:
    shares = {str(k): share_within(ranks, k) for k in ks}
    return {
        "questions": len(ranks),
        "failed": sum(ranked.failure is not None for ranked in ranks),
        "ceiling": {k: None if share is None else round(share.value, 4) for k, share in shares.items()},
        "interval": {
            k: None if share is None else [round(share.low, 4), round(share.high, 4)]
            for k, share in shares.items()
        },
    }


def _cells(name: str, ranks: Sequence[AnswerRank], ks: Sequence[int]) -> tuple[Text, ...]:
    failed = sum(ranked.failure is not None for ranked in ranks)
    shares = (_show_share(share_within(ranks, k)) for k in ks)
    # A name from a file may hold what rich would take for markup.
    return tuple(Text(cell) for cell in (name, str(len(ranks)), str(failed), *shares))


def _show_share(share: Share | None) -> str:
    """The interval in whole percent, so that the table fits a terminal."""
    return "-" if share is None else f"{share.value:.1%}\n{100 * share.low:.0f}-{100 * share.high:.0f}"


def _explain(ranks: Sequence[AnswerRank], ks: Sequence[int]) -> None:
    """What a reader of the table would take wrong."""
    failures = [ranked.failure for ranked in ranks if ranked.failure is not None]
    if failures:
        logger.warning(
            "%d of %d searches failed and are counted apart; the first: %s",
            len(failures),
            len(ranks),
            failures[0].reason,
        )
    most = max(ranked.num_found for ranked in ranks)
    if most < ks[-1] and len(failures) < len(ranks):
        logger.warning("no question found more than %d passages: deeper shares are that of %d", most, most)


def _write_details(ranks: Sequence[AnswerRank], path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for ranked in ranks:
            record = {
                "question": ranked.question.text,
                "golden_answers": ranked.question.golds,
                "data_source": ranked.question.data_source,
                "rank": ranked.rank,
                "failure": ranked.failure and f"{ranked.failure.kind}: {ranked.failure.reason}",
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _draw(ranks: Sequence[AnswerRank], path: Path, *, ks: Sequence[int]) -> None:
    # Here, because matplotlib takes a second to import.
    from search_r1.search.ceiling_plot import draw_ceiling

    path.parent.mkdir(parents=True, exist_ok=True)
    draw_ceiling(ranks, path, ks=ks, title="Retriever's ceiling: answers found by the question itself")
    logger.info("drew %s", path)

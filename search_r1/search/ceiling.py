"""`index ceiling`: how often the answer is in the passages that a question finds, before anything is trained.

    index ceiling --questions data/nq_hotpotqa/test.parquet --url http://127.0.0.1:8000
    index ceiling --questions mine.jsonl --index_path e5_Flat.index --corpus_path wiki-18.jsonl

The question itself is the query: an agent that asks better or more than once can find more. A passage has the
answer when the words of a gold answer occur in it in a row, both normalized as exact match does; an answer
like `no` occurs by chance. A query whose search failed is counted apart: it is neither found nor missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_r1.search.defaults import REPOSITORY
from search_r1.search.errors import RetrieverError
from search_r1.search.progress import PhaseProgress
from search_r1.search.retriever import Outcome, Retriever, SearchFailure
from search_r1.search.schema import MAX_TOPK
from search_r1.search.settings import RETRIEVER_SETTINGS, add_retriever_arguments, resolve_retriever
from serving.answers import AnswerRule, find_answer
from serving.questions import QuestionError, find_golds, find_question, read_rows, require_text

logger = logging.getLogger(__name__)

_Z = 1.959963984540054
"""97.5 % point of the normal distribution: intervals of 95 %."""
_REACH_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedQuestion:
    """One question of a data set."""

    text: str
    golds: tuple[str, ...]
    """Accepted answers, at least one."""
    data_source: str
    """The name of the file where it does not state one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRank:
    """Where the answer of one question was found."""

    question: AskedQuestion
    rank: int | None
    """Of the first passage that has the answer, from 1; None when none has it, or the search failed."""
    failure: SearchFailure | None = None
    """Why the rank is unknown."""


Share: TypeAlias = tuple[float, float, float]
"""A share of questions and its Wilson interval of 95 %: value, low, high."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `index ceiling`, and those of every retriever."""
    add = parser.add_argument
    add(
        "--questions",
        type=Path,
        nargs="+",
        default=[REPOSITORY / "world" / "test.parquet"],
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
    add("--plot", type=Path, metavar="FILE", help="draw a picture (PNG)")
    add_retriever_arguments(parser)


def run(settings: argparse.Namespace) -> int:
    """Measure, print a table and a last line of JSON. 1 when every search failed. Raises RetrieverError."""
    _check(settings)
    questions = read_questions(settings.questions, limit=settings.num_questions)
    ranks, facts = asyncio.run(_measure(questions, settings))
    ks = sorted(set(settings.topk))
    Console(file=sys.stdout).print(_make_table(ranks, ks))
    failures = [ranked.failure for ranked in ranks if ranked.failure is not None]
    if failures:
        shown = (len(failures), len(ranks), failures[0].reason)
        logger.warning("%d of %d searches failed and are counted apart; the first: %s", *shown)
    if settings.plot is not None and len(failures) < len(ranks):
        _draw(ranks, settings.plot, ks=ks)
    summary = {
        **_summarize(ranks, ks),
        "failures": dict(Counter(failure.kind.value for failure in failures)),
        "by_source": {source: _summarize(part, ks) for source, part in by_source(ranks).items()},
        "retriever": facts,
    }
    sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")
    return 1 if len(failures) == len(ranks) else 0


def read_questions(paths: Sequence[Path], *, limit: int | None = None) -> list[AskedQuestion]:
    """Return the questions of all files in order; of more than `limit`, so many drawn at random.

    Raises RetrieverError that names file and row.
    """
    questions: list[AskedQuestion] = []
    for path in paths:
        if not path.is_file():
            raise RetrieverError(f"--questions {path} is not a file; expected parquet or JSON")
        try:
            questions += [
                AskedQuestion(
                    text=find_question(row, where=where),
                    golds=find_golds(row, where=where),
                    data_source=require_text(
                        row.get("data_source", path.stem), where=where, name="data_source"
                    ),
                )
                for where, row in read_rows(path)
            ]
        except QuestionError as error:
            raise RetrieverError(str(error)) from error
    if not questions:
        raise RetrieverError(f"no questions in {', '.join(map(str, paths))}")
    if limit is None or limit >= len(questions):
        return questions
    # The first ones would often be those of one data source.
    return [questions[row] for row in sorted(random.Random(0).sample(range(len(questions)), limit))]


async def measure_ranks(
    questions: Sequence[AskedQuestion], retriever: Retriever, settings: argparse.Namespace
) -> list[AnswerRank]:
    """Search for every question and return the rank of its answer, in order.

    Raises RetrieverError when the retriever fails for every query alike.
    """
    rule, topk = AnswerRule(settings.answer_rule), max(settings.topk)
    slots = asyncio.Semaphore(retriever.num_parallel_calls)
    size = max(1, min(settings.batch_size, retriever.max_batch))
    num_done = 0

    async def measure(batch: Sequence[AskedQuestion]) -> list[AnswerRank]:
        nonlocal num_done
        async with slots:
            texts = [question.text for question in batch]
            outcomes = await retriever.search(texts, topk=topk, timeout_s=settings.timeout_s)
            parts = zip(batch, outcomes, strict=True)
            ranked = await asyncio.to_thread(lambda: [_rank(*part, rule=rule) for part in parts])
        num_done += len(batch)
        progress("search", num_done, len(questions))
        return ranked

    with PhaseProgress() as progress:
        async with asyncio.TaskGroup() as group:
            starts = range(0, len(questions), size)
            tasks = [group.create_task(measure(questions[start : start + size])) for start in starts]
    return [ranked for task in tasks for ranked in task.result()]


def _rank(question: AskedQuestion, outcome: Outcome, *, rule: AnswerRule) -> AnswerRank:
    if isinstance(outcome, SearchFailure):
        return AnswerRank(question=question, rank=None, failure=outcome)
    index = find_answer([hit.document.contents for hit in outcome], question.golds, rule=rule)
    return AnswerRank(question=question, rank=None if index is None else index + 1)


def share_within(ranks: Sequence[AnswerRank], k: int) -> Share | None:
    """Return the share of questions, of those whose search did not fail, with the answer in the first `k`.

    None when there are none.
    """
    known = [ranked for ranked in ranks if ranked.failure is None]
    hits = sum(ranked.rank is not None and ranked.rank <= k for ranked in known)
    return wilson_share(hits, len(known)) if known else None


def wilson_share(hits: int, count: int) -> Share:
    """Return the Wilson score interval: sensible also for few questions and for shares near 0 and 1."""
    share = hits / count
    scale = 1 + _Z**2 / count
    center = (share + _Z**2 / (2 * count)) / scale
    radius = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / scale
    # At 0 and at 1 the interval ends there; rounding must not move it.
    return share, 0.0 if hits == 0 else center - radius, 1.0 if hits == count else center + radius


def by_source(ranks: Sequence[AnswerRank]) -> dict[str, list[AnswerRank]]:
    """Return the ranks of every data source, in alphabetical order."""
    parts: dict[str, list[AnswerRank]] = {}
    for ranked in sorted(ranks, key=lambda ranked: ranked.question.data_source):
        parts.setdefault(ranked.question.data_source, []).append(ranked)
    return parts


def _summarize(ranks: Sequence[AnswerRank], ks: Sequence[int]) -> dict[str, object]:
    """Return a part of the table, for programs."""
    rounded = {str(k): [round(part, 4) for part in share_within(ranks, k) or ()] for k in ks}
    return {
        "questions": len(ranks),
        "failed": sum(ranked.failure is not None for ranked in ranks),
        "ceiling": {k: share[0] if share else None for k, share in rounded.items()},
        "interval": {k: share[1:] or None for k, share in rounded.items()},
    }


def _make_table(ranks: Sequence[AnswerRank], ks: Sequence[int]) -> Table:
    """Make a row per data source and one for all, with intervals of 95 % in whole percent."""
    table = Table(
        title="Questions whose answer is in the passages found, intervals of 95 %", title_justify="left"
    )
    table.add_column("data source", overflow="fold")
    for name in ("questions", "failed", *(f"top {k}" for k in ks)):
        table.add_column(name, justify="right")
    parts = by_source(ranks)
    for name, part in (parts | ({"all": list(ranks)} if len(parts) > 1 else {})).items():
        shares = [share_within(part, k) for k in ks]
        shown = [f"{s[0]:.1%}\n{100 * s[1]:.0f}-{100 * s[2]:.0f}" if s else "-" for s in shares]
        failed = sum(ranked.failure is not None for ranked in part)
        # A name from a file may hold what rich would take for markup.
        table.add_row(*(Text(cell) for cell in (name, str(len(part)), str(failed), *shown)))
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
    """Return the ranks, and what the retriever's answers depend on. Raises RetrieverError."""
    if settings.url:
        retriever, facts = await _reach(settings.url)
    else:
        from search_r1.search.assemble import open_retriever

        retriever = await open_retriever(resolve_retriever(settings))
        facts = dict(retriever.describe())
    try:
        return await measure_ranks(questions, retriever, settings), facts
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        await retriever.aclose()


async def _reach(url: str) -> tuple[Retriever, dict[str, object]]:
    from search_r1.search.remote import RemoteRetriever
    from serving.http import CallError

    try:
        remote = RemoteRetriever(url, token=os.environ.get("RETRIEVER_TOKEN") or None)
        # Fails early where no server answers: batches have much longer deadlines.
        described = await remote.fetch_description(timeout_s=_REACH_S)
    except (ValueError, CallError) as error:
        raise RetrieverError(f"--url: {error}") from error
    return remote, {**remote.describe(), **(described or {})}


def _draw(ranks: Sequence[AnswerRank], path: Path, *, ks: Sequence[int]) -> None:
    """Draw the share of questions answered within the first k passages over k, a line per data source."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from serving.plotting import COLORS, INK, STYLE

    depths = range(ks[0], ks[-1] + 1)
    parts = by_source(ranks)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 4.1), layout="constrained")
        axes = figure.subplots()
        if len(parts) > 1:
            parts |= {f"all {len(ranks)} questions": list(ranks)}
        for color, (name, part) in zip(cycle([*COLORS[: len(parts) - 1], INK]), parts.items(), strict=False):
            shares = {k: share[0] for k in depths if (share := share_within(part, k)) is not None}
            axes.plot(list(shares), list(shares.values()), color=color, label=name)
            marks = [k for k in ks if k in shares]
            axes.plot(marks, [shares[k] for k in marks], "o", color=color, markersize=4)
        axes.set_xscale("log")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set(xlabel="passages looked at", ylabel="questions whose answer is in them")
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    logger.info("drew %s", path)

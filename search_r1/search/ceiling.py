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
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_r1.search.asking import (
    AskedQuestion,
    Share,
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
from search_r1.search.retriever import Outcome, Retriever, SearchFailure
from serving.answers import AnswerRule, find_answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRank:
    """Where the answer of one question was found."""

    question: AskedQuestion
    rank: int | None
    """Of the first passage that has the answer, from 1; None when none has it, or the search failed."""
    failure: SearchFailure | None = None
    """Why the rank is unknown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `index ceiling`, and those of every retriever."""
    add = parser.add_argument
    add(
        "--answer_rule",
        choices=tuple(map(str, AnswerRule)),
        default=str(AnswerRule.folded),
        help="how answers and passages are normalized: as reward.answer_rule of the trainer (default folded)",
    )
    add("--topk", type=int, nargs="+", default=[1, 3, 10, 100], metavar="K", help="depths to look at")
    add("--plot", type=Path, metavar="FILE", help="draw a picture (.png, .pdf or .svg)")
    add_asking_arguments(parser)


def run(settings: argparse.Namespace) -> int:
    """Measure, print a table and a last line of JSON. 1 when every search failed. Raises RetrieverError."""
    check_asking(settings)
    for k in settings.topk:
        check_depth("topk", k)
    if settings.plot is not None:
        if settings.plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise RetrieverError(f"--plot {settings.plot}: expected a name that ends in .png, .pdf or .svg")
        prepare_output(settings.plot, flag="--plot")
    questions = read_questions(settings.questions, limit=settings.num_questions)
    ranks, facts = asyncio.run(_measure(questions, settings))
    ks = sorted(set(settings.topk))
    Console(file=sys.stdout).print(_make_table(ranks, ks))
    failures = [ranked.failure for ranked in ranks if ranked.failure is not None]
    if failures:
        shown = (len(failures), len(ranks), failures[0].reason)
        logger.warning("%d of %d searches failed and are counted apart; the first: %s", *shown)
    summary = {
        **_summarize(ranks, ks),
        "failures": dict(Counter(failure.kind.value for failure in failures)),
        "by_source": {source: _summarize(part, ks) for source, part in by_source(ranks).items()},
        "retriever": facts,
    }
    sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")
    if settings.plot is not None and len(failures) < len(ranks):
        _draw(ranks, settings.plot, ks=ks)
    return 1 if len(failures) == len(ranks) else 0


async def measure_ranks(
    questions: Sequence[AskedQuestion], retriever: Retriever, settings: argparse.Namespace
) -> list[AnswerRank]:
    """Search for every question and return the rank of its answer, in order.

    Raises RetrieverError when the retriever fails for every query alike.
    """
    rule = AnswerRule(settings.answer_rule)
    return await search_all(
        questions,
        retriever,
        settings=settings,
        topk=max(settings.topk),
        query=lambda question: question.text,
        answer=lambda question, outcome: _rank(question, outcome, rule=rule),
    )


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
        shown = [format_share(share) for share in shares]
        failed = sum(ranked.failure is not None for ranked in part)
        # A name from a file may hold what rich would take for markup.
        table.add_row(*(Text(cell) for cell in (name, str(len(part)), str(failed), *shown)))
    return table


async def _measure(
    questions: Sequence[AskedQuestion], settings: argparse.Namespace
) -> tuple[list[AnswerRank], dict[str, object]]:
    """Return the ranks, and what the retriever's answers depend on. Raises RetrieverError."""
    async with open_asked(settings) as (retriever, facts):
        return await measure_ranks(questions, retriever, settings), facts


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
        figure.savefig(path, dpi=110)
    logger.info("drew %s", path)

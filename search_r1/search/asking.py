"""Questions of a data set, asked one retriever: what the commands `index ceiling` and `index audit` share."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from search_r1.search.defaults import REPOSITORY
from search_r1.search.errors import RetrieverError
from search_r1.search.progress import PhaseProgress
from search_r1.search.retriever import Outcome, Retriever
from search_r1.search.schema import MAX_TOPK
from search_r1.search.settings import RETRIEVER_SETTINGS, add_retriever_arguments, resolve_retriever
from serving.questions import (
    QuestionError,
    Row,
    find_golds,
    find_question,
    read_rows,
    read_support,
    require_text,
)

_Z = 1.959963984540054
"""97.5 % point of the normal distribution: intervals of 95 %."""
_REACH_S = 10.0
_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")
_Answered = TypeVar("_Answered", bound="_OfQuestion")


class _OfQuestion(Protocol):
    """What is known of one question."""

    @property
    def question(self) -> AskedQuestion: ...


Share: TypeAlias = tuple[float, float, float]
"""A share of questions and its Wilson interval of 95 %: value, low, high."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedQuestion:
    """One question of a data set."""

    text: str
    golds: tuple[str, ...]
    """Accepted answers, at least one."""
    data_source: str
    """The name of the file where it does not state one."""
    uid: str = ""
    """`data_source/split/index`, where the row has these; otherwise file and number of the row."""
    supporting_ids: tuple[str, ...] = ()
    """Ids or titles of the passages that support the answer."""
    supporting_texts: tuple[str, ...] = ()
    """Their contents in the same order, where the data has them."""


def add_asking_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for questions and the retriever that they are asked."""
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
    add("--num_questions", type=int, metavar="N", help="draw so many of them at random (all if left out)")
    add("--batch_size", type=int, default=64, help="questions searched at once")
    add("--timeout_s", type=float, default=600.0, help="deadline of a batch")
    add_retriever_arguments(parser)


def check_asking(settings: argparse.Namespace, *, allowed_with_url: Sequence[str] = ()) -> None:
    """Raise RetrieverError for values out of range, and for flags of a retriever beside `--url`."""
    for name, value in (("num_questions", settings.num_questions), ("batch_size", settings.batch_size)):
        if value is not None and value < 1:
            raise RetrieverError(f"--{name} must be at least 1, got {value}")
    if not settings.timeout_s > 0:
        raise RetrieverError(f"--timeout_s must be more than 0 seconds, got {settings.timeout_s}")
    given = [s.flag for s in RETRIEVER_SETTINGS if s.name in settings and s.name not in allowed_with_url]
    if settings.url and given:
        raise RetrieverError(
            f"--url asks a running server, which has its own {given[0]}: leave one of them out"
        )


def check_depth(name: str, k: int) -> None:
    """Raise RetrieverError unless so many passages can be asked for."""
    if not 1 <= k <= MAX_TOPK:
        raise RetrieverError(f"--{name} must be in 1..{MAX_TOPK}, got {k}")


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
                _read_question(row, where=where, path=path, number=number)
                for number, (where, row) in enumerate(read_rows(path))
            ]
        except QuestionError as error:
            raise RetrieverError(str(error)) from error
    if not questions:
        raise RetrieverError(f"no questions in {', '.join(map(str, paths))}")
    if limit is None or limit >= len(questions):
        return questions
    # The first ones would often be those of one data source.
    return [questions[row] for row in sorted(random.Random(0).sample(range(len(questions)), limit))]


def _read_question(row: Row, *, where: str, path: Path, number: int) -> AskedQuestion:
    source = require_text(row.get("data_source", path.stem), where=where, name="data_source")
    extra = row.get("extra_info")
    named = [extra.get(name) for name in ("split", "index")] if isinstance(extra, Mapping) else [None]
    supporting_ids, supporting_texts = read_support(row, where=where)
    return AskedQuestion(
        text=find_question(row, where=where),
        golds=find_golds(row, where=where),
        data_source=source,
        uid=f"{path.name}/{number}" if None in named else "/".join(map(str, [source, *named])),
        supporting_ids=supporting_ids,
        supporting_texts=supporting_texts,
    )


@asynccontextmanager
async def open_asked(settings: argparse.Namespace) -> AsyncIterator[tuple[Retriever, dict[str, object]]]:
    """Yield the retriever of the flags, and what its answers depend on. Raises RetrieverError."""
    if settings.url:
        retriever, facts = await _reach(settings.url)
    else:
        from search_r1.search.assemble import open_retriever

        retriever = await open_retriever(resolve_retriever(settings))
        facts = dict(retriever.describe())
    try:
        yield retriever, facts
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


async def search_all(
    asked: Sequence[_Asked],
    retriever: Retriever,
    *,
    settings: argparse.Namespace,
    topk: int,
    query: Callable[[_Asked], str],
    answer: Callable[[_Asked, Outcome], _Answer],
    phase: str = "search",
) -> list[_Answer]:
    """Search for the query of each, and return what `answer` makes of the outcomes, in order.

    `answer` runs in threads. No more results are held than are searched at a time. Raises RetrieverError
    when the retriever fails for every query alike.
    """
    slots = asyncio.Semaphore(retriever.num_parallel_calls)
    size = max(1, min(settings.batch_size, retriever.max_batch))
    num_done = 0

    async def ask(batch: Sequence[_Asked]) -> list[_Answer]:
        nonlocal num_done
        async with slots:
            texts = [query(one) for one in batch]
            outcomes = await retriever.search(texts, topk=topk, timeout_s=settings.timeout_s)
            parts = zip(batch, outcomes, strict=True)
            answers = await asyncio.to_thread(lambda: [answer(*part) for part in parts])
        num_done += len(batch)
        progress(phase, num_done, len(asked))
        return answers

    with PhaseProgress() as progress:
        async with asyncio.TaskGroup() as group:
            starts = range(0, len(asked), size)
            tasks = [group.create_task(ask(asked[start : start + size])) for start in starts]
    return [found for task in tasks for found in task.result()]


def wilson_share(hits: int, count: int) -> Share:
    """Return the Wilson score interval: sensible also for few questions and for shares near 0 and 1."""
    share = hits / count
    scale = 1 + _Z**2 / count
    center = (share + _Z**2 / (2 * count)) / scale
    radius = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / scale
    # At 0 and at 1 the interval ends there; rounding must not move it.
    return share, 0.0 if hits == 0 else center - radius, 1.0 if hits == count else center + radius


def format_share(share: Share | None) -> str:
    """Return a share in percent with its interval in whole percent in a second line, `-` for None."""
    return f"{share[0]:.1%}\n{100 * share[1]:.0f}-{100 * share[2]:.0f}" if share else "-"


def prepare_output(path: Path, *, flag: str) -> None:
    """Make the folder of the output before hours of searches. Raises RetrieverError if it cannot be used."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RetrieverError(f"{flag} {path}: {error.strerror or error}; name another file") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise RetrieverError(f"{flag} {path} cannot be written; name a file in a folder of yours")


def by_source(answered: Sequence[_Answered]) -> dict[str, list[_Answered]]:
    """Return what is known of the questions of every data source, in alphabetical order."""
    parts: dict[str, list[_Answered]] = {}
    for one in sorted(answered, key=lambda one: one.question.data_source):
        parts.setdefault(one.question.data_source, []).append(one)
    return parts

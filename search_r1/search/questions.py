"""Questions with their accepted answers, from the files that serving/questions.py reads."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from search_r1.search.errors import RetrieverError
from serving.questions import QuestionError, find_golds, find_question, read_rows, require_text


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedQuestion:
    """One question of a data set."""

    text: str
    golds: tuple[str, ...]
    """Accepted answers, at least one."""
    data_source: str
    """Where a file does not say: its name without the ending."""


def read_questions(paths: Sequence[Path], *, limit: int | None = None, seed: int = 0) -> list[AskedQuestion]:
    """The questions of all files in order; of more than `limit`, so many drawn at random.

    Raises RetrieverError that names file and row.
    """
    questions = [question for path in paths for question in _read_file(path)]
    if not questions:
        raise RetrieverError(f"no questions in {', '.join(map(str, paths))}")
    if limit is None or limit >= len(questions):
        return questions
    # The first ones would often be those of one data source.
    rows = sorted(random.Random(seed).sample(range(len(questions)), limit))
    return [questions[row] for row in rows]


def _read_file(path: Path) -> Iterator[AskedQuestion]:
    if not path.is_file():
        raise RetrieverError(f"--questions {path} is not a file; expected parquet or JSON")
    try:
        for where, row in read_rows(path):
            source = require_text(row.get("data_source", path.stem), where=where, name="data_source")
            yield AskedQuestion(
                text=find_question(row, where=where), golds=find_golds(row, where=where), data_source=source
            )
    except QuestionError as error:
        raise RetrieverError(str(error)) from error

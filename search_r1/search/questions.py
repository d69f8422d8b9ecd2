"""Questions with their accepted answers, from parquet in Search-R1's schema or from JSONL.

{"question": "Where was Alice Marsh born?", "golden_answers": ["Bolton"], "data_source": "nq"}
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from search_r1.search.errors import RetrieverError
from serving.golds import EXPECTED_GOLDS, parse_golds

_GOLDS_NAMES = ("golden_answers", "answers")
_PARQUET_COLUMNS = ("question", "reward_model")
_MAX_SHOWN_CHARS = 80


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
        raise RetrieverError(f"--questions {path} is not a file; expected parquet or JSONL")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)
    for where, row in rows:
        yield AskedQuestion(
            text=_text(row.get("question"), where=where, name="question").strip(),
            golds=_golds(row, where=where),
            data_source=_text(row.get("data_source", path.stem), where=where, name="data_source"),
        )


def _read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        missing = [column for column in _PARQUET_COLUMNS if column not in names]
        if missing:
            raise RetrieverError(
                f"{path}: column {', '.join(missing)} is missing (it has {', '.join(names)}); make the file "
                "with scripts/prepare_data.py"
            )
        columns = [column for column in (*_PARQUET_COLUMNS, "data_source") if column in names]
        rows = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RetrieverError(f"{path}: not a readable parquet file ({error})") from error
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _read_lines(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row: object = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise RetrieverError(f"{where} is not JSON in UTF-8 ({error})") from error
            if not isinstance(row, dict):
                _refuse(
                    where, "the line", row, 'an object like {"question": "...", "golden_answers": ["..."]}'
                )
            yield where, row


def _golds(row: Mapping[str, object], *, where: str) -> tuple[str, ...]:
    name = next((name for name in _GOLDS_NAMES if name in row), None)
    target: object = row[name] if name else None
    if name is None and isinstance(reward_model := row.get("reward_model"), dict):
        truth = reward_model.get("ground_truth")
        name, target = (
            "reward_model.ground_truth.target",
            truth.get("target") if isinstance(truth, dict) else None,
        )
    golds = parse_golds(target)
    if not golds:
        _refuse(where, name or " or ".join(_GOLDS_NAMES), target, EXPECTED_GOLDS)
    return golds


def _text(value: object, *, where: str, name: str) -> str:
    """A text that says something and that UTF-8 can spell."""
    if not isinstance(value, str) or not value.strip():
        _refuse(where, name, value, "a text that is not empty")
    return value.encode("utf-8", "replace").decode("utf-8")


def _refuse(where: str, name: str, value: object, expected: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:_MAX_SHOWN_CHARS]}…"
    raise RetrieverError(f"{where}: {name} is {shown}, expected {expected}; correct or drop this row")

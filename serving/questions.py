"""Read question files of this project and of related ones.

| written by                          | question             | gold answers                        |
|-------------------------------------|----------------------|-------------------------------------|
| Search-R1, our prepare_data         | question             | reward_model.ground_truth.target    |
| verl (preprocess_search_r1_dataset) | extra_info.question  | reward_model.ground_truth.target    |
| SkyRL                               | extra_info.question  | reward_spec.ground_truth.target     |
| IGPO                                | prompt (one message) | reward_model.ground_truth, one text |
| FlashRAG, own JSON lines            | question             | golden_answers or answers           |
| HotpotQA (a JSON array)             | question             | answer                              |

A ground truth may be a struct with `target`, a list, a text, the JSON text of the first two, or one text with
`<|answer_split|>` between the answers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import pyarrow

Row = Mapping[str, object]

MATH = "math"
"""The column `ability` of mathematical problems, whose text need not end in a question mark."""
_QUESTIONS = ("question", "extra_info.question")
_GOLDS = (
    "reward_model.ground_truth",
    "reward_spec.ground_truth",
    "golden_answers",
    "answers",
    "answer",
)
_SEPARATOR = "<|answer_split|>"
_TAG = re.compile(r"</?\w+>")
_MAX_SHOWN_CHARS = 80
_EXPECTED_GOLDS = "a text, a number or a list of these with at least one that is not empty"
_INFINITE = (math.inf, -math.inf)
_SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate, which JSON can contain and no tokenizer can read."""


class QuestionError(ValueError):
    """A file or row contains no question; the message names file, row, column, value and fix."""


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the location of each row and the row, of a parquet, JSON-lines or JSON-array file in UTF-8.

    A byte order mark and blank lines are skipped. Raises QuestionError.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"PAR1") or path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif start.startswith(b"["):
            yield from _read_array(path)
        else:
            yield from _read_lines(path)
    except OSError as error:
        raise QuestionError(f"{path}: cannot be read ({error.strerror or error})") from error


def find_question(row: Row, *, where: str) -> str:
    """Return the text of the question. Raises QuestionError."""
    if (bare := find_bare_prompt(row)) is not None:
        return require_text(bare, where=where, name="prompt[0].content")
    name, value = _find(row, _QUESTIONS) or _refuse_row(row, _QUESTIONS, where=where)
    return require_text(value, where=where, name=name).strip()


def find_bare_prompt(row: Row) -> str | None:
    """Return the question of a row whose prompt is only the question and which has no other one.

    A prompt with tags, such as `</answer>`, is more than a question.
    """
    prompt = row.get("prompt")
    if _find(row, _QUESTIONS) is not None or not isinstance(prompt, list) or len(prompt) != 1:
        return None
    content = prompt[0].get("content") if isinstance(prompt[0], Mapping) else None
    if not isinstance(content, str) or not content.strip() or _TAG.search(content):
        return None
    return content.strip()


def find_golds(row: Row, *, where: str, optional: bool = False) -> tuple[str, ...]:
    """Return the gold answers, at least one unless they are optional. Raises QuestionError."""
    found = _find(row, _GOLDS)
    if optional and (found is None or found[1] == []):
        return ()
    name, value = found or _refuse_row(row, _GOLDS, where=where)
    if isinstance(value, str):
        value = _unpack(value)
    if isinstance(value, Mapping):
        name, value = f"{name}.target", value.get("target")
    golds = parse_golds(value)
    if not golds:
        refuse(value, where=where, name=name, expected=_EXPECTED_GOLDS)
    return golds


def parse_golds(value: object) -> tuple[str, ...]:
    """Return the gold answers; empty if there are none, or one is neither a text nor a number.

    Missing values (None, NaN, blank text) are dropped from a list. A number that is integral is written
    without ".0": a column of years is often stored as floats. Texts are kept as they are.
    """
    members = value if isinstance(value, list | tuple) else [value]
    present = [member for member in members if not _is_missing(member)]
    golds = tuple(text for text in map(_write, present) if text is not None)
    return golds if len(golds) == len(present) else ()


def read_support(row: Row, *, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return ids and texts of the supporting passages; empty where there are none. Raises QuestionError."""
    extra = row.get("extra_info")
    extra = extra if isinstance(extra, Mapping) else {}
    ids, texts = extra.get("supporting_ids") or [], extra.get("supporting_texts") or []
    name = "extra_info.supporting_ids"
    if not isinstance(ids, list) or not all(_is_id(passage_id) for passage_id in ids):
        refuse(ids, where=where, name=name, expected="a list of ids, which are texts or whole numbers")
    name = "extra_info.supporting_texts"
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        refuse(texts, where=where, name=name, expected="a list of texts that are not empty")
    if texts and len(texts) != len(ids):
        expected = f"one text for each of the {len(ids)} extra_info.supporting_ids, or none at all"
        refuse(texts, where=where, name=name, expected=expected)
    return tuple(map(str, ids)), tuple(texts)


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and value != ""


def require_text(value: object, *, where: str, name: str) -> str:
    """Return the value if it is a text that is not blank. Raises QuestionError."""
    if not isinstance(value, str) or not value.strip():
        refuse(value, where=where, name=name, expected="a text that is not empty")
    if half := _SURROGATE.search(value):
        refuse(half[0], where=where, name=f"character {half.start()} of {name}", expected="a whole character")
    return value


def refuse(value: object, *, where: str, name: str, expected: str) -> NoReturn:
    """Raise QuestionError for a value."""
    shown = repr(value)
    shown = shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:_MAX_SHOWN_CHARS]}…"
    raise QuestionError(f"{where}: {name} is {shown}, expected {expected}; correct or drop this row")


def _refuse_row(row: Row, names: tuple[str, ...], *, where: str) -> NoReturn:
    """Raise QuestionError for a row without any of these columns, naming those that it has."""
    raise QuestionError(
        f"{where}: none of {', '.join(names)} has a value (there are {', '.join(row) or 'none'});"
        " add one of these, or correct or drop this row"
    )


def _find(row: Row, names: tuple[str, ...]) -> tuple[str, object] | None:
    """Return the first name that has a value, and the value."""
    for name in names:
        value: object = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return name, value
    return None


def _unpack(text: str) -> object:
    """Return the ground truth that a text encodes."""
    if text.lstrip().startswith(("{", "[")):
        try:
            parsed: object = json.loads(text)
        except (ValueError, RecursionError):
            return text
        is_truth = isinstance(parsed, list) or (isinstance(parsed, dict) and "target" in parsed)
        return parsed if is_truth else text
    return text.split(_SEPARATOR)


def _is_missing(member: object) -> bool:
    return (
        member is None
        or (isinstance(member, float) and math.isnan(member))
        or (isinstance(member, str) and not member.strip())
    )


def _write(member: object) -> str | None:
    """Return the text of a gold answer, None if the value cannot be one."""
    if isinstance(member, float) and member.is_integer():
        return str(int(member))
    if isinstance(member, bool) or not isinstance(member, str | int | float) or member in _INFINITE:
        return None
    text = str(member)
    return None if _SURROGATE.search(text) else text


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        table.validate(full=True)  # texts are UTF-8
    except (pyarrow.ArrowException, OSError) as error:
        raise QuestionError(f"{path}: not a readable parquet file ({error}); make it again") from error
    columns = {name: _read_column(table, name, path=path) for name in table.column_names}
    for number in range(table.num_rows):
        yield f"{path}, row {number}", {name: values[number] for name, values in columns.items()}


def _read_column(table: pyarrow.Table, name: str, *, path: Path) -> list[object]:
    """Return the values of a column. Raises QuestionError for what Python has no type for."""
    try:
        values: list[object] = table.column(name).to_pylist()
    except (ValueError, OverflowError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise QuestionError(
            f"{path}: column {name!r} cannot be read ({error}); drop it, or store it as text"
        ) from error
    return values


def _read_array(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows: object = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise QuestionError(f"{path}: not a JSON array in UTF-8 ({error}); save it again") from error
    assert isinstance(rows, list)
    for number, row in enumerate(rows):
        yield (where := f"{path}, row {number}"), _require_object(row, where=where)


def _read_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:  # as bytes, so that a line that is not UTF-8 has a number
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            try:
                row: object = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise QuestionError(f"{where}: not JSON in UTF-8 ({error}); correct or drop it") from error
            yield where, _require_object(row, where=where)


def _require_object(row: object, *, where: str) -> Row:
    if not isinstance(row, dict):
        refuse(
            row, where=where, name="the row", expected='an object like {"question": "...", "answers": [...]}'
        )
    return row

"""Parquet files in the Search-R1 schema -> `Question`s, or an error that names the file, the row and the fix.

Read are `data_source`, `prompt` (chat messages), `reward_model.ground_truth.target`, `question` and
`extra_info.{split,index}`; other columns are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from serving.golds import EXPECTED_GOLDS, parse_golds
from verl.errors import DataError
from verl.protocols import Tokenizer
from verl.types import Message, Question, complete_question

if TYPE_CHECKING:
    import pyarrow

_COLUMNS = ("data_source", "prompt", "reward_model", "extra_info", "question")
_MAX_NAMED = 3


def load_questions(files: Sequence[str | Path], *, limit: int | None = None) -> list[Question]:
    """The questions of all files in order, at most `limit`; uid is `data_source/split/index`.

    Raises DataError for a missing or malformed file or row and for a uid that occurs twice.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    for file in map(Path, files):
        for number, row in enumerate(_read_rows(file)):
            place = f"{file}, row {number}"
            question = _parse_row(row, place=place)
            if question.uid in places:
                raise DataError(
                    f"{place}: uid {question.uid!r} is already that of {places[question.uid]}; it keys the "
                    "groups: make extra_info.index unique within data_source and extra_info.split"
                )
            places[question.uid] = place
            questions.append(question)
    if not questions:
        raise DataError(f"no questions in {', '.join(map(str, files)) or 'an empty list of files'}")
    return questions if limit is None else questions[:limit]


def check_prompt_lengths(
    questions: Sequence[Question], *, tokenizer: Tokenizer, max_start_length: int
) -> None:
    """Raise DataError when a prompt has more than `max_start_length` tokens: prompts are never cut."""
    lengths = {question.uid: len(tokenizer.render_prompt(question)) for question in questions}
    too_long = {uid: length for uid, length in lengths.items() if length > max_start_length}
    if too_long:
        named = ", ".join(f"{uid} ({length})" for uid, length in list(too_long.items())[:_MAX_NAMED])
        raise DataError(
            f"{len(too_long)} of {len(questions)} prompts have more tokens than data.max_start_length="
            f"{max_start_length}, as {named}; set it to at least {max(too_long.values())} or drop those rows"
        )


def _read_rows(file: Path) -> list[Mapping[str, object]]:
    table = _read_table(file)
    missing = [column for column in _COLUMNS if column not in table.column_names]
    if missing:
        raise DataError(
            f"{file}: column {', '.join(missing)} is missing (it has {', '.join(table.column_names)}); "
            "make the file with scripts/prepare_data.py"
        )
    rows: list[Mapping[str, object]] = table.select(list(_COLUMNS)).to_pylist()
    return rows


def _read_table(file: Path) -> pyarrow.Table:
    import pyarrow
    from pyarrow import parquet

    if not file.is_file():
        raise DataError(f"{file}: no such file; check data.train_files and data.val_files")
    try:
        table = parquet.read_table(file)
        table.validate(full=True)  # texts are UTF-8
        return table
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({error}); make it again") from error


def _parse_row(row: Mapping[str, object], *, place: str) -> Question:
    extra = _mapping(row["extra_info"], place=place, column="extra_info")
    split = _text(extra.get("split"), place=place, column="extra_info.split")
    index = extra.get("index")
    if not isinstance(index, int | str) or isinstance(index, bool) or index == "":
        _refuse(place, "extra_info.index", index, "a number or a name")
    data_source = _text(row["data_source"], place=place, column="data_source")
    return Question(
        uid=f"{data_source}/{split}/{index}",
        text=complete_question(_text(row["question"], place=place, column="question")),
        messages=_parse_messages(row["prompt"], place=place),
        golds=_parse_golds(row["reward_model"], place=place),
        data_source=data_source,
    )


def _parse_messages(value: object, *, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _refuse(place, "prompt", value, "a list of chat messages [{role, content}]")
    messages = []
    for number, message in enumerate(value):
        column = f"prompt[{number}]"
        fields = _mapping(message, place=place, column=column)
        role = _text(fields.get("role"), place=place, column=f"{column}.role")
        messages.append(
            Message(role=role, content=_text(fields.get("content"), place=place, column=f"{column}.content"))
        )
    return tuple(messages)


def _parse_golds(value: object, *, place: str) -> tuple[str, ...]:
    column = "reward_model.ground_truth.target"
    reward_model = _mapping(value, place=place, column="reward_model")
    truth = _mapping(reward_model.get("ground_truth"), place=place, column="reward_model.ground_truth")
    golds = parse_golds(truth.get("target"))
    if not golds:
        _refuse(place, column, truth.get("target"), EXPECTED_GOLDS)
    return golds


def _mapping(value: object, *, place: str, column: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        _refuse(place, column, value, "a struct")
    return value


def _text(value: object, *, place: str, column: str) -> str:
    """A text that says something."""
    if not isinstance(value, str) or not value.strip():
        _refuse(place, column, value, "a text that is not empty")
    return value


def _refuse(place: str, column: str, value: object, expected: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "…"
    raise DataError(f"{place}: {column} is {shown}, expected {expected}; correct or drop this row")

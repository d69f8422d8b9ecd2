"""Parquet files of this and other projects -> `Question`s, or an error with file, row, column and fix.

Read are `data_source`, `prompt` (chat messages), `extra_info.{split,index}`, the ids and texts of supporting
passages (`extra_info.{supporting_ids,supporting_texts}`, optional), and question and gold answers as in
serving/questions.py; other columns are ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from serving.answers import complete_question
from serving.questions import (
    MATH,
    QuestionError,
    Row,
    find_golds,
    find_question,
    read_rows,
    read_support,
    refuse,
    require_text,
)
from verl.errors import DataError
from verl.protocols import PromptFormat
from verl.types import Message, Question

logger = logging.getLogger(__name__)

_MAX_NAMED = 3


def load_questions(
    files: Sequence[str | Path],
    *,
    prompt_format: PromptFormat,
    prompt: str = "auto",
    limit: int | None = None,
) -> list[Question]:
    """Return the questions of all files in order, at most `limit`; uid is `data_source/split/index`.

    `prompt` is the setting `data.prompt`: whether a question is asked with the prompt of its row or with the
    instruction of the prompt file. Raises DataError for a missing or malformed file or row and for a uid that
    occurs twice.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    bare: list[str] = []
    for file in map(Path, files):
        if not file.is_file():
            raise DataError(f"{file}: no such file; check data.train_files and data.val_files")
        try:
            found = [
                (where, _parse_row(row, where=where, prompt_format=prompt_format, prompt=prompt, bare=bare))
                for where, row in read_rows(file)
            ]
        except QuestionError as error:
            raise DataError(str(error)) from error
        for where, question in found:
            if question.uid in places:
                raise DataError(
                    f"{where}: uid {question.uid!r} is already that of {places[question.uid]}; it keys the "
                    "groups: make extra_info.index unique within data_source and extra_info.split"
                )
            places[question.uid] = where
            questions.append(question)
    if not questions:
        raise DataError(f"no questions in {', '.join(map(str, files)) or 'an empty list of files'}")
    if bare:
        logger.info(
            "the prompt of %d of %d rows is only the question (%s): they get the instruction of "
            "data.prompt_file",
            len(bare),
            len(questions),
            bare[0],
        )
    return questions if limit is None else questions[:limit]


def check_prompt_lengths(
    questions: Sequence[Question], *, prompt_format: PromptFormat, max_start_length: int
) -> None:
    """Raise DataError when a prompt has more than `max_start_length` tokens: prompts are never cut."""
    lengths = {question.uid: len(prompt_format.render_prompt(question)) for question in questions}
    too_long = {uid: length for uid, length in lengths.items() if length > max_start_length}
    if too_long:
        named = ", ".join(f"{uid} ({length})" for uid, length in list(too_long.items())[:_MAX_NAMED])
        raise DataError(
            f"{len(too_long)} of {len(questions)} prompts have more tokens than data.max_start_length="
            f"{max_start_length}, as {named}; set it to at least {max(too_long.values())} or drop those rows"
        )


def require_supporting_ids(questions: Sequence[Question], *, method: str) -> None:
    """Raise DataError if no question has ids of supporting passages; warn if some have none."""
    lacking = sum(not question.supporting_ids for question in questions)
    if lacking == len(questions):
        raise DataError(
            f"algorithm={method} needs extra_info.supporting_ids, and no row of data.train_files has any; "
            "scripts/prepare_data.py writes them for HotpotQA, 2WikiMultihopQA and MuSiQue, or take another "
            "algorithm"
        )
    if lacking:
        logger.warning(
            "%d of %d training questions have no extra_info.supporting_ids: algorithm=%s rewards them by "
            "their outcome alone",
            lacking,
            len(questions),
            method,
        )


def _parse_row(
    row: Row, *, where: str, prompt_format: PromptFormat, prompt: str, bare: list[str]
) -> Question:
    """Return the question of a row; append `where` to `bare` if its own prompt has no instruction."""
    extra = row.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    split = require_text(extra.get("split"), where=where, name="extra_info.split")
    index = extra.get("index")
    if not isinstance(index, int | str) or isinstance(index, bool) or index == "":
        refuse(index, where=where, name="extra_info.index", expected="a whole number or a name")
    data_source = require_text(row.get("data_source"), where=where, name="data_source")
    text = find_question(row, where=where)
    if row.get("ability") != MATH:  # a problem is a request more often than a question
        text = complete_question(text)
    is_bare = _is_bare(row.get("prompt"), text)
    has_prompt = row.get("prompt") is not None and not is_bare
    if prompt == "file" or (prompt == "auto" and not has_prompt):
        if is_bare and prompt == "auto":
            bare.append(where)
        messages = prompt_format.write_prompt(text)
    elif has_prompt:
        messages = _parse_messages(row["prompt"], where=where, prompt_format=prompt_format)
    else:
        raise QuestionError(
            f"{where}: prompt is {row.get('prompt')!r}, which has no instruction, but data.prompt=parquet "
            "takes it from there; use data.prompt=auto or file, which take it from data.prompt_file"
        )
    supporting_ids, supporting_texts = read_support(row, where=where)
    return Question(
        uid=f"{data_source}/{split}/{index}",
        text=text,
        messages=messages,
        golds=find_golds(row, where=where),
        data_source=data_source,
        supporting_ids=supporting_ids,
        supporting_texts=supporting_texts,
    )


def _is_bare(prompt: object, question: str) -> bool:
    """Return whether a prompt is one message with nothing but the question."""
    if not isinstance(prompt, list) or len(prompt) != 1 or not isinstance(prompt[0], dict):
        return False
    content = prompt[0].get("content")
    return (
        isinstance(content, str)
        and bool(content.strip())
        and question in (content.strip(), complete_question(content))
    )


def _parse_messages(value: object, *, where: str, prompt_format: PromptFormat) -> tuple[Message, ...]:
    """Return the prompt as it is. Raises QuestionError where it does not fit the format."""
    if not isinstance(value, list) or not value:
        refuse(value, where=where, name="prompt", expected="a list of chat messages [{role, content}]")
    messages = []
    for number, message in enumerate(value):
        fields = message if isinstance(message, dict) else {}
        role, content = (
            require_text(fields.get(name), where=where, name=f"prompt[{number}].{name}")
            for name in ("role", "content")
        )
        messages.append(Message(role=role, content=content))
    if (problem := prompt_format.check_prompt(messages)) is not None:
        raise QuestionError(
            f"{where}: prompt {problem}; ask these questions with the instruction of data.prompt_file: "
            "data.prompt=file"
        )
    return tuple(messages)

"""The prompt of a question: as in the data of the run, else the instruction of the prompt file.

Rows of a data file can carry a prompt of their own, which the policy was trained on. Its frame is found by
taking the question out of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from verl.data.dataset import load_questions
from verl.protocols import PromptFormat
from verl.trainer.config.data import DataConfig
from verl.types import Message, Question

logger = logging.getLogger(__name__)

WritePrompt = Callable[[str], tuple[Message, ...]]
_PLACE = "\0"


def find_prompt(data: DataConfig, *, prompt_format: PromptFormat) -> WritePrompt:
    """Return what writes the prompts of a run for other questions. Raises DataError for a damaged file.

    A warning says where that cannot be found: then it is the instruction of the prompt file.
    """
    if data.prompt == "file":
        return prompt_format.write_prompt
    missing = [path for path in data.val_paths if not Path(path).is_file()]
    if missing:
        logger.warning("%s is not there, so that its prompt is not known: %s", missing[0], _INSTEAD)
        return prompt_format.write_prompt
    questions = load_questions(data.val_paths, prompt_format=prompt_format, prompt=data.prompt)
    frames = {_take_out(question) for question in questions}
    if len(frames) != 1 or None in frames:
        logger.warning("the questions of %s have no prompt in common: %s", data.val_paths[0], _INSTEAD)
        return prompt_format.write_prompt
    (frame,) = frames
    assert frame is not None
    return lambda question: _put_in(frame, question)


_INSTEAD = "the instruction of data.prompt_file is used instead, by which answers can differ"


def _take_out(question: Question) -> tuple[Message, ...] | None:
    """Return the prompt with a mark in place of the question; None unless that occurs exactly once."""
    contents = [message.content for message in question.messages]
    if sum(content.count(question.text) for content in contents) != 1:
        return None
    return _replaced(question.messages, question.text, _PLACE)


def _put_in(frame: Sequence[Message], question: str) -> tuple[Message, ...]:
    return _replaced(frame, _PLACE, question)


def _replaced(messages: Sequence[Message], old: str, new: str) -> tuple[Message, ...]:
    return tuple(
        Message(role=message.role, content=message.content.replace(old, new)) for message in messages
    )

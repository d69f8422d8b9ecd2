"""The output of `index audit`: whether the corpus that was searched has the evidence for each question.

Searches alone cannot tell this of evidence without known passage ids (titles, gold answers): what no search
finds may still be in the corpus. The audit reads the corpus.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from serving.answers import complete_question
from serving.evidence import Evidence
from serving.files import sha256_of_file
from verl.errors import DataError
from verl.types import Question
from verl.utils.files import parse_json

logger = logging.getLogger(__name__)

_KEY = "evaluation.audit"
_FIX = "write it with `index audit --questions FILE --output FILE`"
_NAMED = 12
"""Digits of a hash in messages."""


class _AuditedItem(TypedDict):
    id: str
    in_corpus: bool | None


class _AuditedQuestion(TypedDict):
    """A line of the output; its other entries are not read."""

    uid: str
    question: str
    items: list[_AuditedItem]
    corpus_sha256: str | None


_SHAPE = TypeAdapter(_AuditedQuestion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What the corpus has of the evidence."""

    sha256: str
    """Of the file."""
    in_corpus: Mapping[str, tuple[bool | None, ...]]
    """By uid, one entry per item of the evidence; None where the audit does not know it."""


def read_audit(path: Path, questions: Sequence[Question], *, corpus_sha256: str | None) -> Audit:
    """Return what an audit says of these questions; it may have more.

    `corpus_sha256` is that of the corpus that is searched; None where the retriever does not state it. Raises
    DataError for a file that is not an audit, or is one of another corpus or of other questions.
    """
    lines = _read_lines(path)
    hashes = {line["corpus_sha256"] for line in lines.values()}
    if None in hashes or corpus_sha256 is None:
        logger.warning(
            "%s=%s: whether it is of the corpus that is searched is unknown: %s states no hash",
            _KEY,
            path,
            "the retriever" if corpus_sha256 is None else "the audit",
        )
    elif hashes != {corpus_sha256}:
        other = next(one for one in hashes if one not in (None, corpus_sha256))
        raise DataError(
            f"{_KEY}={path}: the audit is of a corpus with the SHA-256 {other[:_NAMED]}, the retriever "
            f"searches one with {corpus_sha256[:_NAMED]}; audit the corpus that is searched"
        )
    missing = [question.uid for question in questions if question.uid not in lines]
    if missing:
        raise DataError(
            f"{_KEY}={path} lacks {len(missing)} of {len(questions)} questions (for example {missing[0]}); "
            "audit all files of data.val_files, without --num_questions"
        )
    in_corpus = {
        question.uid: _match(lines[question.uid], question, where=f"{_KEY}={path}") for question in questions
    }
    return Audit(sha256=sha256_of_file(path), in_corpus=in_corpus)


def _read_lines(path: Path) -> dict[str, _AuditedQuestion]:
    """Return the lines of the file by uid. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{_KEY}={path} is not a file; {_FIX}")
    with path.open("rb") as file:
        lines = [
            parse_json(line, shape=_SHAPE, where=f"{_KEY}={path}:{number}", fix=_FIX)
            for number, line in enumerate(file, start=1)
        ]
    if not lines:
        raise DataError(f"{_KEY}={path} is empty; {_FIX}")
    return {line["uid"]: line for line in lines}


def _match(line: _AuditedQuestion, question: Question, *, where: str) -> tuple[bool | None, ...]:
    """Return what the corpus has of the question's evidence. Raises DataError if the audit's is another."""
    evidence = Evidence.of(
        supporting_ids=question.supporting_ids,
        supporting_texts=question.supporting_texts,
        golds=question.golds,
    )
    text, items = line["question"], [item["id"] for item in line["items"]]
    if question.text not in (text, complete_question(text)) or items != [*evidence.items]:
        raise DataError(
            f"{where}: {question.uid} is the question {text!r} with the evidence {items} there, in "
            f"data.val_files {question.text!r} with {[*evidence.items]}; audit the same files"
        )
    return tuple(item["in_corpus"] for item in line["items"])

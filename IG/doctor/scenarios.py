"""What a search may have found for a question: nothing, a part, all of it, or something else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from enum import StrEnum

from IG.doctor.questions import AskedQuestion, Document

FIRST = "first"
"""Role of the document that a chain of facts begins with."""


class Scenario(StrEnum):
    """One outcome of a search."""

    none = "none"
    first = "first"
    """The supporting document whose role is `first`, alone."""
    rest = "rest"
    """The other supporting documents, without the first."""
    supporting = "supporting"
    """All supporting documents."""
    random = "random"
    """As many documents of other questions."""


LABELS = {
    Scenario.none: "no document",
    Scenario.first: "only the first",
    Scenario.rest: "only the rest",
    Scenario.supporting: "all supporting",
    Scenario.random: "random",
}


def contexts_of(
    question: AskedQuestion, *, others: Sequence[AskedQuestion], rng: random.Random
) -> dict[Scenario, str]:
    """The context of every scenario that the question has, `none` always first and blank.

    `others` is where random documents come from; documents that the question has itself are not drawn.
    """
    contexts = {Scenario.none: ""}
    documents = question.documents
    if not documents:
        return contexts
    leading = [document for document in documents if document.role == FIRST]
    following = [document for document in documents if document.role != FIRST]
    if leading and following:
        contexts[Scenario.first] = _join(leading)
        contexts[Scenario.rest] = _join(following)
    contexts[Scenario.supporting] = _join(documents)
    foreign = _draw_foreign(documents, others=others, rng=rng)
    if foreign:
        contexts[Scenario.random] = _join(foreign)
    return contexts


def _join(documents: Sequence[Document]) -> str:
    return "\n".join(document.text for document in documents)


def _draw_foreign(
    own: Sequence[Document], *, others: Sequence[AskedQuestion], rng: random.Random
) -> list[Document]:
    taken = {document.text for document in own}
    pool = list(_foreign(others, taken=taken))
    return rng.sample(pool, len(own)) if len(pool) >= len(own) else []


def _foreign(others: Sequence[AskedQuestion], *, taken: set[str]) -> Iterator[Document]:
    seen = set(taken)
    for question in others:
        for document in question.documents:
            if document.text not in seen:
                seen.add(document.text)
                yield document

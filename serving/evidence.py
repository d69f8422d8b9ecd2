"""The evidence for an answer, and where it stands in lists of passages: the same rule in every analysis.

The evidence is the supporting passages that the data names, by id or title. Without any it is every passage
in which a gold answer occurs, which an answer like `no` does by chance: it has no evidence then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeAlias

from serving.answers import AnswerRule, find_answer, normalize_answer

PassageText: TypeAlias = tuple[str, str]
"""Id and contents, the first of several lines being the title."""
_BY_CHANCE = frozenset({"yes", "no", "true", "false"})


class EvidenceKind(StrEnum):
    """What the evidence of a question was taken from."""

    SUPPORTING_IDS = "supporting_ids"
    GOLD_STRINGS = "gold_strings"
    NONE = "none"
    """No supporting passages are named, and the gold answers occur anywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What has to be read to know the answer: all of its items."""

    kind: EvidenceKind
    items: tuple[str, ...]
    """Ids or titles of supporting passages; of gold answers the first one, which stands for all."""
    texts: tuple[str, ...] = ()
    """Contents of the supporting passages in the same order, where the data has them."""
    golds: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, *, supporting_ids: Sequence[str], supporting_texts: Sequence[str], golds: Sequence[str]
    ) -> Self:
        """Return the evidence of a question."""
        if supporting_ids:
            # Paragraphs of one article can have the same title.
            first = {name: row for row, name in reversed([*enumerate(supporting_ids)])}
            items = tuple(dict.fromkeys(supporting_ids))
            texts = tuple(supporting_texts[first[item]] for item in items) if supporting_texts else ()
            return cls(kind=EvidenceKind.SUPPORTING_IDS, items=items, texts=texts, golds=tuple(golds))
        if any(normalize_answer(gold) in _BY_CHANCE for gold in golds):
            return cls(kind=EvidenceKind.NONE, items=(), golds=tuple(golds))
        return cls(kind=EvidenceKind.GOLD_STRINGS, items=tuple(golds[:1]), golds=tuple(golds))

    @property
    def names_ids(self) -> bool:
        """Return whether the items are certainly ids of passages, and not titles."""
        return bool(self.texts) and not self._names_titles

    @property
    def _names_titles(self) -> bool:
        """Return whether the items are the titles of the texts, as in HotpotQA."""
        pairs = zip(self.items, self.texts, strict=False)
        return bool(self.texts) and all(title_of(text) == item for item, text in pairs)

    def find(self, passages: Sequence[PassageText]) -> list[int | None]:
        """Return for each item the index of the first passage that is it; None where none is."""
        if self.kind is EvidenceKind.GOLD_STRINGS:
            return [find_answer((text for _, text in passages), self.golds, rule=AnswerRule.folded)]
        by_id: dict[str, int] = {}
        by_title: dict[str, int] = {}
        for index, (passage_id, contents) in enumerate(passages):
            by_id.setdefault(passage_id, index)
            by_title.setdefault(title_of(contents), index)
        places = [] if self._names_titles else [by_id]
        places += [] if self.names_ids else [by_title]
        found = ([place[item] for place in places if item in place] for item in self.items)
        return [min(indexes, default=None) for indexes in found]

    def best_queries(self, question: str) -> list[str]:
        """Return for each item the query that should find it: its own text, or question and gold answer."""
        if self.kind is EvidenceKind.GOLD_STRINGS:
            return [f"{question} {self.golds[0]}"]
        return [" ".join(text.replace('"', " ").split()) for text in self.texts or self.items]


def title_of(contents: str) -> str:
    """Return the title of a passage without quotes; empty for contents of one line."""
    title, newline, _ = contents.partition("\n")
    return title.strip(' "') if newline else ""


def find_corpus_hash(facts: Mapping[str, object]) -> str | None:
    """Return the SHA-256 of the corpus that a retriever states for all of its parts; None where it has none.

    The names of the parts of a hybrid retriever have a prefix; a server has the facts below `retriever`.
    """
    nested = facts.get("retriever")
    found = {**facts, **(nested if isinstance(nested, Mapping) else {})}
    hashes = {str(value) for key, value in found.items() if value and key.split(".")[-1] == "corpus_sha256"}
    return hashes.pop() if len(hashes) == 1 else None

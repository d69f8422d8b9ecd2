"""Compare short answers, and complete questions, by the same rules in reward, IG service and analysis.

Two answers can be equal in two senses. `normalize_answer` is the rule of SQuAD, by which exact match, cover
match and F1 count. `same_text_key` is stricter: it decides which sampled answers are one text for the
entailment model, so it keeps "-5" and "5" apart, which SQuAD does not. Both fold typography first (`fold`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import islice
from typing import Literal, TypeAlias


class AnswerRule(StrEnum):
    """How the text of an answer is normalized before it is compared with the gold answers."""

    folded = "folded"
    """Fold typography, then apply the rule of SQuAD; of a text that it leaves empty, delete less."""
    published = "published"
    """The rule of SQuAD alone, as Search-R1 and InfoReasoner apply it."""


Level: TypeAlias = Literal["punctuation and articles", "punctuation", "nothing"]

# What is deleted from a text; the first level that leaves something is used. Of "A." the first level leaves
# nothing and the second "a", of "!!!" only the last leaves something.
_LEVELS: Mapping[AnswerRule, tuple[Level, ...]] = {
    AnswerRule.folded: ("punctuation and articles", "punctuation", "nothing"),
    AnswerRule.published: ("punctuation and articles",),
}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FULL_OR_HALF_WIDTH = re.compile("[\u3000\uff01-\uffee]+")
_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u02bb\u02bc\u2039\u203a", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u300c\u300d\u300e\u300f\u301d\u301e\u301f", '"')
    # Hyphens, dashes and the minus sign, not the letters and marks that look like them (U+30FC, U+00AF).
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63", "-")
    # The dot between parts of a foreign name in Chinese and Japanese.
    | dict.fromkeys("\u2022\u2027\u22c5\u30fb", "\u00b7")
    | {"\u3001": ",", "\u3002": ".", "\u2026": "...", "\u301c": "~"}
    # Invisible: soft hyphen, zero-width space, direction marks, word joiner, byte order mark.
    | dict.fromkeys("\u00ad\u200b\u200e\u200f\u2060\ufeff", "")
)
# Scripts that are written without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, Tai; kana,
# bopomofo and Han with their extensions. Hangul is written with spaces.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3005-\u3007\u3021-\u3029\u3038-\u303b"
    "\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaadf\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003fffd"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_FINAL = ".,;:!? "
_QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u037e")
"""Latin, full-width, Arabic and Greek."""


def fold(text: str) -> str:
    """Return the text with each character in its plain form, where that cannot change the meaning.

    Composed characters (NFC); full- and half-width forms of East Asian typesetting as the characters they
    stand for; typographic quotes, dashes, minus sign and ellipsis as in ASCII; no invisible characters.
    NFKC would do more than that: it takes the meaning out of superscripts and fractions.
    """
    if text.isascii():
        return text
    wide = _FULL_OR_HALF_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return unicodedata.normalize("NFC", wide.translate(_TYPOGRAPHY))


def normalize_answer(text: str, *, rule: AnswerRule = AnswerRule.folded) -> str:
    """Return the key by which exact match compares: lower case, no ASCII punctuation, no a, an, the.

    By the folded rule it is empty only for blank text.
    """
    return next(filter(None, (_delete(text, level, rule=rule) for level in _LEVELS[rule])), "")


def find_answer(texts: Iterable[str], golds: Iterable[str], *, rule: AnswerRule) -> int | None:
    """Return the index of the first text in which the words of a gold answer occur in a row, if any.

    Texts and gold answers are normalized alike. A gold answer that normalizes to nothing is never found.
    """
    wanted = []
    for gold in golds:
        forms = ((level, _delete(gold, level, rule=rule)) for level in _LEVELS[rule])
        wanted += [(level, _spaced(form)) for level, form in forms if form][:1]
    levels = {level for level, _ in wanted}
    for index, text in enumerate(texts):
        spaced = {level: _spaced(_delete(text, level, rule=rule)) for level in levels}
        if any(gold in spaced[level] for level, gold in wanted):
            return index
    return None


def split_words(text: str) -> list[str]:
    """Split at white space, and scripts that are written without spaces into their characters."""
    return _WORD.findall(text)


def truncate_words(text: str, *, max_words: int) -> str:
    """Return the first words (as `split_words` counts them), white space between them as single spaces.

    A text that is short enough is returned as it is. Time is linear in what is kept.
    """
    matches = list(islice(_WORD.finditer(text), max_words + 1))
    return text if len(matches) <= max_words else " ".join(text[: matches[max_words - 1].end()].split())


def same_text_key(answer: str) -> str:
    """Return the key under which the IG service counts sampled answers as the same text.

    It leaves out case, spacing, final punctuation and quotes around all of it, after folding.
    Nothing else is left out: "-5" and "5", "3.5" and "35", "C" and "C++", "50" and "50%" stay different.
    """
    words = " ".join(fold(answer).lower().split())
    bare = words.rstrip(_FINAL) or words
    while len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'":
        inner = bare[1:-1].strip().rstrip(_FINAL)
        if not inner:
            break
        bare = inner
    return bare


def complete_question(text: str) -> str:
    """Strip a question and end it in a question mark, unless one of any script ends it already.

    The prompt of Search-R1 and all published IG clients do so. The policy's instruction, what the IG service
    is asked and what its entailment model reads go through here.
    """
    text = text.strip()
    return text if text.endswith(_QUESTION_MARKS) else f"{text}?"


def _delete(text: str, level: Level, *, rule: AnswerRule) -> str:
    """Return the text in lower case and with single spaces, without what the level deletes."""
    kept = (text if rule is AnswerRule.published else fold(text)).lower()
    if level != "nothing":
        kept = kept.translate(_DELETE_PUNCTUATION)
    if level == "punctuation and articles":
        kept = _ARTICLES.sub(" ", kept)
    return " ".join(kept.split())


def _spaced(text: str) -> str:
    """Return the words with one space around each, of a text that has single spaces."""
    return f" {text if text.isascii() else ' '.join(split_words(text))} "

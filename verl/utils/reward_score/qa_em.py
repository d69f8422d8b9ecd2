"""Score a short answer against several gold answers: exact match, cover match, F1 of words, F1 of word sets.

    >>> exact_match("The Bolton.", ["Bolton, England", "bolton"])
    1.0

Strings in, floats in [0, 1] out. The trainer takes the answer from the trajectory, where it is a structured
fact. The functions below `normalize_answer` keep the names and signatures of Search-R1 and InfoReasoner for
scripts that import them; they read a transcript, with or without its prompt, by the published rule.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from serving import answers
from serving.answers import AnswerRule, fold, split_words
from verl.utils.reward_score.IG_reward import combine

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_INFORMATION = re.compile(r"<information>\s*\S.*?</information>", re.DOTALL)
_SEPARATORS = re.compile(r"[^\w\s]|_")
_END_OF_INSTRUCTION = "<answer> Beijing </answer>. Question:"
"""The published instruction has answer and information tags of its own, before the question."""
_GAIN_WEIGHT = 0.6


def exact_match(prediction: str, golds: Iterable[str], *, rule: AnswerRule = AnswerRule.folded) -> float:
    """Return 1.0 if the prediction equals a gold answer after normalization; an empty one equals none."""
    predicted = answers.normalize_answer(prediction, rule=rule)
    accepted = {answers.normalize_answer(gold, rule=rule) for gold in golds}
    return float(predicted in accepted - {""})


def sub_exact_match(prediction: str, golds: Iterable[str], *, rule: AnswerRule = AnswerRule.folded) -> float:
    """Return 1.0 if a gold answer occurs in the prediction after normalization (cover match).

    Lenient, as published: long predictions cover much, and `art` is found inside `party`. A gold answer of
    articles and punctuation alone must be equal: `a` is inside almost every text.
    """
    accepted = tuple(golds)
    if exact_match(prediction, accepted, rule=rule):
        return 1.0
    folded = [fold(text) if rule is AnswerRule.folded else text for text in (prediction, *accepted)]
    predicted, *inside = (answers.normalize_answer(text, rule=AnswerRule.published) for text in folded)
    return float(any(gold in predicted for gold in inside if gold))


def word_f1(prediction: str, golds: Iterable[str], *, rule: AnswerRule = AnswerRule.folded) -> float:
    """Return the best F1 over the gold answers between bags (not sets) of normalized words.

    In scripts without spaces each character is a word; by the published rule only white space separates.
    """
    predicted = _count_words(prediction, rule=rule)
    return max((overlap_f1(predicted, _count_words(gold, rule=rule)) for gold in golds), default=0.0)


def set_f1(prediction: str, golds: Iterable[str], *, rule: AnswerRule = AnswerRule.folded) -> float:
    """Return the best F1 over the gold answers between sets of words in lower case.

    Punctuation separates words and articles count, other than in SQuAD (IGPO, arXiv 2510.14967, section 4.1).
    By the folded rule typography is folded first, and scripts without spaces are split into characters.
    """
    predicted = _distinct_words(prediction, rule=rule)
    return max((overlap_f1(predicted, _distinct_words(gold, rule=rule)) for gold in golds), default=0.0)


def overlap_f1(predicted: Counter[str], gold: Counter[str]) -> float:
    """Return the harmonic mean of the shares of `predicted` and of `gold` that both have."""
    common = (predicted & gold).total()
    return 2.0 * common / (predicted.total() + gold.total()) if common else 0.0


def _count_words(text: str, *, rule: AnswerRule) -> Counter[str]:
    normalized = answers.normalize_answer(text, rule=rule)
    return Counter(split_words(normalized) if rule is AnswerRule.folded else normalized.split())


def _distinct_words(text: str, *, rule: AnswerRule) -> Counter[str]:
    words = _SEPARATORS.sub(" ", (fold(text) if rule is AnswerRule.folded else text).lower())
    return Counter(set(split_words(words) if rule is AnswerRule.folded else words.split()))


def normalize_answer(s: str) -> str:
    """Return the answer in lower case without ASCII punctuation and articles: the rule of SQuAD alone."""
    return answers.normalize_answer(s, rule=AnswerRule.published)


def em_check(prediction: str, golden_answers: str | Iterable[str]) -> int:
    """Return 1 if the prediction equals a gold answer by the published rule; an empty one equals none."""
    return int(exact_match(prediction, _as_golds(golden_answers), rule=AnswerRule.published))


def subem_check(prediction: str, golden_answers: str | Iterable[str]) -> int:
    """Return 1 if a gold answer occurs in the prediction by the published rule; an empty one never does."""
    return int(sub_exact_match(prediction, _as_golds(golden_answers), rule=AnswerRule.published))


def extract_solution(solution_str: str) -> str | None:
    """Return the last complete answer of a transcript; None if it has none.

    The example in the prompt does not count: as published, a transcript without an answer had "Beijing".
    """
    found = _ANSWER.findall(_response_of(solution_str))
    return found[-1].strip() if found else None


def compute_score_em(
    solution_str: str,
    ground_truth: Mapping[str, str | Iterable[str]],
    method: str = "strict",  # noqa: ARG001 - published, and without effect there too
    format_score: float = 0.0,
    score: float = 1.0,
    info_gain_score: float | None = None,
) -> float:
    """Return `score` for an answer that equals a gold answer, else `format_score`; 0 without an answer.

    0.6 of `info_gain_score` is added if the transcript has search results, as in InfoReasoner. None adds
    nothing, as in Search-R1: the gain is not asked for here, see `IG_client.IGClient`.
    """
    answer = extract_solution(solution_str)
    if answer is None:
        return 0.0
    outcome = score if em_check(answer, ground_truth["target"]) else format_score
    has_results = _INFORMATION.search(_response_of(solution_str)) is not None
    return combine(outcome, info_gain_score if has_results else None, weight=_GAIN_WEIGHT)


def compute_score_subem(
    solution_str: str,
    ground_truth: Mapping[str, str | Iterable[str]],
    method: str = "strict",  # noqa: ARG001 - published, and without effect there too
    format_score: float = 0.0,
    score: float = 1.0,
) -> float:
    """Return `score` if the answer covers a gold answer, else `format_score`; 0 without an answer."""
    answer = extract_solution(solution_str)
    if answer is None:
        return 0.0
    return score if subem_check(answer, ground_truth["target"]) else format_score


def _response_of(solution_str: str) -> str:
    _, end, response = solution_str.partition(_END_OF_INSTRUCTION)
    return response if end else solution_str


def _as_golds(golden_answers: str | Iterable[str]) -> list[str]:
    return [golden_answers] if isinstance(golden_answers, str) else list(golden_answers)

"""Beliefs against a reading straight from the definition: every pair, transitive closure, plain sums."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from IG.belief import Belief, BeliefReader
from IG.sampler import SampledAnswer
from IG.semantics import ScoreKind, jackknife_error
from IG.sharing import SharedJudgements, Source, Work
from serving.answers import same_text_key

QUESTION = "Where was Alice born?"
TEXTS = [
    "",
    "a",
    "A.",
    "b",
    '"B"',
    "b!",
    "c",
    "yes",
    "no",
    "5",
    "-5",
    "\uff15",
    "1,000",
    "é",
    "e\u0301",
    "x" * 3000,
]
THRESHOLD = 0.5


@dataclass(slots=True)
class Meanings:
    """P(entails) between any two texts; judges in any order."""

    seed: int
    order: random.Random | None = None
    by_spelling: bool = False
    """As real models do; else it is the same for all spellings of a text."""
    asked: list[tuple[str, str]] = field(default_factory=list)

    def entails(self, premise: str, hypothesis: str) -> float:
        one, other = same_text_key(premise), same_text_key(hypothesis)
        if one == other:
            return 1.0
        if self.by_spelling:
            one, other = premise, hypothesis
        return random.Random(f"{self.seed} {one} {other}").choice([0.0, 0.2, 0.5, 0.50001, 0.9])

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | Exception]:
        positions = list(range(len(pairs)))
        if self.order is not None:
            self.order.shuffle(positions)
        judged: list[float | Exception] = [math.nan] * len(pairs)
        for at in positions:
            self.asked.append(pairs[at])
            premise, hypothesis = (text.removeprefix(f"{QUESTION} ") for text in pairs[at])
            judged[at] = self.entails(premise, hypothesis)
            await asyncio.sleep(0)
        return judged


@dataclass(frozen=True, slots=True)
class Case:
    """Samples of one condition, the golds, and what the entailment model thinks."""

    texts: list[str]
    mean_log_probs: list[float]
    golds: list[str]
    seed: int

    def read(self, score: ScoreKind, *, full: bool, judge: Meanings | None = None) -> Belief:
        answers = tuple(
            SampledAnswer(text=text, mean_log_prob=value, num_tokens=1)
            for text, value in zip(self.texts, self.mean_log_probs, strict=True)
        )
        judgements = SharedJudgements(judge or Meanings(self.seed), size=10_000)
        reader = BeliefReader(judgements, score=score, threshold=THRESHOLD)
        return asyncio.run(
            reader.read(
                answers, question=QUESTION, golds=self.golds, full=full, source=Source.sampled, work=Work()
            )
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    texts = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=8))
    values = draw(st.lists(st.floats(-9, 0), min_size=len(texts), max_size=len(texts)))
    golds = draw(st.lists(st.sampled_from([text for text in TEXTS if text]), min_size=1, max_size=4))
    return Case(texts, values, golds, draw(st.integers(0, 999)))


def weights_of(mean_log_probs: list[float]) -> list[float]:
    total = math.fsum(math.exp(value) for value in mean_log_probs)
    return [math.exp(value) / total for value in mean_log_probs]


def classes_of(case: Case) -> list[list[bool]]:
    """Which samples mean the same, by squaring the relation until it holds all chains."""
    means = Meanings(case.seed)

    def same(one: str, other: str) -> bool:
        return means.entails(one, other) > THRESHOLD and means.entails(other, one) > THRESHOLD

    size = range(len(case.texts))
    linked = [[same(case.texts[i], case.texts[j]) for j in size] for i in size]
    for _ in size:
        linked = [[any(linked[i][k] and linked[k][j] for k in size) for j in size] for i in size]
    return linked


def hard_by_definition(case: Case, weights: Sequence[float]) -> float:
    means, linked = Meanings(case.seed), classes_of(case)

    def is_gold(text: str) -> bool:
        return any(
            means.entails(text, gold) > THRESHOLD and means.entails(gold, text) > THRESHOLD
            for gold in case.golds
        )

    size = range(len(case.texts))
    right = [any(linked[i][j] and is_gold(case.texts[j]) for j in size) for i in size]
    return math.fsum(weights[i] for i in size if right[i])


def soft_by_definition(case: Case, weights: Sequence[float]) -> float:
    means = Meanings(case.seed)
    return max(
        math.fsum(
            weight * max(means.entails(text, gold), means.entails(gold, text))
            for weight, text in zip(weights, case.texts, strict=True)
        )
        for gold in case.golds
    )


def entropy_by_definition(case: Case, weights: Sequence[float]) -> float:
    classes = {tuple(row) for row in classes_of(case)}
    masses = [
        math.fsum(weight for weight, member in zip(weights, row, strict=True) if member) for row in classes
    ]
    return -math.fsum(mass * math.log(mass) for mass in masses if mass > 0)


BY_DEFINITION = {ScoreKind.hard: hard_by_definition, ScoreKind.soft: soft_by_definition}


@settings(deadline=None, max_examples=150)
@given(cases(), st.sampled_from(ScoreKind), st.booleans())
def test_score_entropy_and_their_errors_are_those_of_the_definition(
    case: Case, score: ScoreKind, full: bool
) -> None:
    belief = case.read(score, full=full)
    by_definition = BY_DEFINITION[score]
    assert belief.score == pytest.approx(by_definition(case, weights_of(case.mean_log_probs)), abs=1e-9)
    assert belief.left_out_scores is not None
    for out, left_out in enumerate(belief.left_out_scores):
        kept = weights_of([v for at, v in enumerate(case.mean_log_probs) if at != out])
        weights = [*kept[:out], 0.0, *kept[out:]]
        assert left_out == pytest.approx(by_definition(case, weights), abs=1e-9)
        if belief.full is not None:
            expected = entropy_by_definition(case, weights)
            assert belief.full.left_out_entropies[out] == pytest.approx(expected, abs=1e-9)
    assert (jackknife_error(belief.left_out_scores) is None) == (len(case.texts) == 1)
    if belief.full is not None:
        expected = entropy_by_definition(case, weights_of(case.mean_log_probs))
        assert belief.full.semantic_entropy == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(cases(), st.sampled_from(ScoreKind), st.integers(0, 999), st.booleans())
def test_nothing_depends_on_how_much_is_read_or_in_which_order_pairs_are_judged(
    case: Case, score: ScoreKind, seed: int, by_spelling: bool
) -> None:
    lazy = Meanings(case.seed, by_spelling=by_spelling)
    full = Meanings(case.seed, by_spelling=by_spelling, order=random.Random(seed))
    one = case.read(score, full=False, judge=lazy)
    other = case.read(score, full=True, judge=full)
    assert one.score == other.score
    assert one.left_out_scores is not None
    assert other.left_out_scores is not None
    assert one.left_out_scores.tolist() == other.left_out_scores.tolist()
    for judge in (lazy, full):
        assert len(set(judge.asked)) == len(judge.asked), "a pair was judged twice"
        assert all(same_text_key(a) != same_text_key(b) for a, b in judge.asked)
    assert len(lazy.asked) <= len(full.asked)


def alike(text: str, *, golds: list[str], copies: int = 1) -> Belief:
    """A model that finds everything unrelated but equal texts."""

    @dataclass(slots=True)
    class Nothing(Meanings):
        def entails(self, premise: str, hypothesis: str) -> float:
            return 0.0

    case = Case([text] * copies, [-0.5] * copies, golds, 0)
    return case.read(ScoreKind.hard, full=True, judge=Nothing(0))


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("yes", "Yes.", 1.0),
        ("5", "-5", 0.0),
        ("5", "5.0", 0.0),
        ("caf\u00e9", "Cafe\u0301", 1.0),
        ("", "Bolton", 0.0),
        ("Bolton " * 2000, "Bolton", 0.0),
    ],
)
@pytest.mark.parametrize("copies", [1, 10])
def test_texts_that_are_the_gold_and_texts_that_are_not(
    answer: str, gold: str, score: float, copies: int
) -> None:
    belief = alike(answer, golds=["Hull", gold], copies=copies)
    assert belief.score == score
    assert belief.full is not None
    assert belief.full.semantic_entropy == 0.0
    assert belief.left_out_scores is not None
    assert jackknife_error(belief.left_out_scores) == (None if copies == 1 else 0.0)

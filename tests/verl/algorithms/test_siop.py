"""What SIOP measures of a group, with a scripted judge of entailment and a scripted scorer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.fakes import make_question, make_trajectory
from tests.methods import credit_group, make_method
from verl.algorithms.base import Measurement, Prefetch
from verl.branches import Branch, Tree, TreeLogProbs
from verl.types import Gain, Group, Score, Trajectory

QUESTION = make_question(text="Where?")
SAME = 0.9


@dataclass
class Judge:
    """Texts that share a letter in upper case entail each other; `support` is that of what was read."""

    support: dict[str, float] = field(default_factory=dict)
    failing: tuple[tuple[str, str], ...] = ()
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        self.asked += pairs
        return [None if pair in self.failing else self.probability(*pair) for pair in pairs]

    def probability(self, premise: str, hypothesis: str) -> float:
        if premise in self.support:
            return self.support[premise]
        one, other = (text.removeprefix(f"{QUESTION.text} ") for text in (premise, hypothesis))
        return SAME if {*filter(str.isupper, one)} & {*filter(str.isupper, other)} else 0.1


@dataclass
class Scorer:
    """Log-prob -2 per token in the first state of a trajectory, and one more after each turn."""

    scores_trajectories: bool = False
    answers: list[list[str]] = field(default_factory=list)
    """Those that were scored, per trajectory."""

    async def score(self, trees: Sequence[Tree]) -> list[TreeLogProbs]:
        self.answers += [list(dict.fromkeys(filter(None, map(_text, tree.branches)))) for tree in trees]
        return [TreeLogProbs(branches=tuple(_scores(tree))) for tree in trees]


def _text(branch: Branch) -> str:
    first, end = branch.scored
    return "".join(map(chr, branch.ids[first:end]))


def _scores(tree: Tree) -> list[np.ndarray]:
    states = sorted({branch.start for branch in tree.branches})
    return [
        np.full(branch.scored[1] - branch.scored[0], -2.0 + states.index(branch.start), np.float32)
        for branch in tree.branches
    ]


def play(*attempts: tuple[tuple[str, ...], str | None], failed: bool = False) -> Group:
    trajectories = [
        make_trajectory(QUESTION, sample=i, queries=queries, answer=answer)
        for i, (queries, answer) in enumerate(attempts)
    ]
    if failed:
        trajectories.append(make_trajectory(QUESTION, queries=("q",), answer="A", failure="search_failed: x"))
    return Group(question=QUESTION, trajectories=tuple(trajectories))


async def measure(
    *groups: Group, judge: Judge | None = None, scorer: Scorer | None = None
) -> list[list[Gain]]:
    return (await measure_all(*groups, judge=judge, scorer=scorer)).gains


async def measure_all(
    *groups: Group, judge: Judge | None = None, scorer: Scorer | None = None
) -> Measurement:
    method = make_method("siop", policy=scorer or Scorer(), entailment=judge or Judge())
    return await method.measure(groups, prefetch=Prefetch())


def rise(after: float, before: float) -> float:
    return math.log(math.exp(after) + 1e-8) - math.log(math.exp(before) + 1e-8)


async def test_turns_are_rewarded_by_the_rise_of_their_own_clusters_belief() -> None:
    """A, AB and B are one cluster through AB; C is alone. Support raises the weight of what it entails."""
    judge, scorer = Judge(support={"q1": 0.8, "q2": 0.4, "q1 | q2": 0.6}), Scorer()
    group = play((("q1", "q2"), "A"), (("q1",), "AB"), ((), "B"), (("q2",), "C"), (("q1",), None))
    (gains,) = await measure(group, judge=judge, scorer=scorer)
    supports = {"ABB": (0.6 + 0.8 + 0.0) / 3, "C": 0.4}
    raw = {"ABB": 0.75 * math.exp(supports["ABB"]), "C": 0.25 * math.exp(supports["C"])}
    q = {name: value / sum(raw.values()) for name, value in raw.items()}
    steps = [rise(-1, -2), rise(0, -1)]
    assert gains[0].turns == pytest.approx([q["ABB"] * steps[0], q["ABB"] * steps[1], q["ABB"] / 2])
    assert gains[1].turns == pytest.approx([q["ABB"] * steps[0], q["ABB"] / 2])
    assert gains[2].turns == pytest.approx([q["ABB"] / 2])  # one turn: the bonus alone
    assert gains[3].turns == pytest.approx([q["C"] * steps[0], q["C"] / 2])
    assert gains[4] == Gain()  # no answer: nothing
    # The one-turn trajectory, whose reward needs no log-prob, and the one without an answer ask for none.
    assert scorer.answers == [["A", "AB", "B"]] * 2 + [[], ["C"], []]
    assert len(judge.asked) == len({*judge.asked})
    assert ("q1", "Where? A") not in judge.asked  # every trajectory's own results only


async def test_the_mean_support_of_answers_shows_whether_the_judge_reads_passages() -> None:
    judge = Judge(support={"q1": 0.8, "q2": 0.1})
    answered = play((("q1",), "A"), (("q2",), "B"), ((), "C"), (("q1",), None))
    measured = await measure_all(answered, play((("q1",), "A")), judge=judge)
    assert measured.stats["ig/support_mean"] == pytest.approx((0.8 + 0.1 + 0.0 + 0.8) / 4)
    assert "ig/support_mean" not in (await measure_all(play((("q1",), None)))).stats


@pytest.mark.parametrize("answers", [[None, None], [None], []])
async def test_a_group_without_answers_measures_nothing_and_judges_nothing(answers: list[str | None]) -> None:
    judge = Judge()
    group = play(*((("q",), answer) for answer in answers), failed=True)
    (gains,) = await measure(group, judge=judge)
    assert gains == [Gain()] * (len(answers) + 1)
    assert judge.asked == []


async def test_a_lone_trajectory_is_its_own_cluster() -> None:
    ((gain,),) = await measure(play((("q",), "A")))
    assert gain.turns == pytest.approx([rise(-1, -2), 0.5])


async def test_a_pair_that_was_not_judged_fails_its_group_and_no_other() -> None:
    judge = Judge(failing=(("Where? C", "Where? A"),))
    lost, whole = await measure(
        play(((), "A"), ((), "C"), ((), None)), play(((), "A"), ((), "B")), judge=judge
    )
    assert [gain.failure is not None for gain in lost] == [True, True, False]
    assert all(gain.failure is None and gain.turns for gain in whole)


def score(*turns: float | None) -> Score:
    return Score(outcome=0.0, gain=Gain(turns=turns))


def advantages(
    trajectories: Sequence[Trajectory], scores: Sequence[Score], **settings: object
) -> list[list[float]]:
    credits = credit_group(make_method("siop", **settings), trajectories, scores)
    return [list(c.components["turn_advantage"] or ()) for c in credits]  # type: ignore[arg-type]


def test_rewards_are_pooled_over_all_turns_and_summed_over_later_ones() -> None:
    group = play((("q",), "A"), ((), "B"), (("q",), None))
    found = advantages(group.trajectories, [score(0.4, 0.1), score(0.1), Score(outcome=0.0)])
    z = (0.4 - 0.2) / (math.sqrt(0.03) + 1e-6), (0.1 - 0.2) / (math.sqrt(0.03) + 1e-6)
    assert found[0] == pytest.approx([z[0] + z[1], z[1]])
    assert found[1] == pytest.approx([z[1]])
    assert found[2] == []
    centered = advantages(
        group.trajectories,
        [score(0.4, 0.1), score(0.1), Score(outcome=0.0)],
        norm_adv_by_std_in_grpo=False,
    )
    assert centered[0] == pytest.approx([0.2 - 0.1, -0.1])

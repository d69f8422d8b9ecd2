"""What methods have scored, and the gains and advantages that they compute from it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import make_question, make_trajectory
from tests.methods import make_method
from verl.algorithms.base import Algorithm, Prefetch
from verl.branches import Tree, TreeLogProbs
from verl.types import (
    Gain,
    Group,
    IntArray,
    Observation,
    Passage,
    Question,
    Score,
    Span,
    SpanKind,
    Stop,
    Trajectory,
    Turn,
)

LOG_PROB_METHODS = ("igpo", "ig_search", "cw_grpo", "tips", "siop")


class Judge:
    """Judges that all texts entail each other, so that a group has one cluster."""

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        return [0.9] * len(pairs)


class PathScorer:
    """The log-prob of a token depends on all tokens before it and on nothing else, as a model's does."""

    def __init__(self, *, scores_trajectories: bool = False) -> None:
        self.scores_trajectories = scores_trajectories
        self.asked: list[Tree] = []

    def log_prob(self, path: IntArray, index: int) -> float:
        weights = np.arange(1, index + 2)
        return -float((path[: index + 1].astype(np.int64) * weights).sum() % 997) / 200.0

    async def score(self, trees: Sequence[Tree]) -> list[TreeLogProbs]:
        self.asked += trees
        return [self._score(tree) for tree in trees]

    def _score(self, tree: Tree) -> TreeLogProbs:
        branches = []
        for i, branch in enumerate(tree.branches):
            path = tree.path(i)
            start = len(path) - len(branch.ids)
            first, end = branch.scored
            branches.append(np.array([self.log_prob(path, start + k) for k in range(first, end)], np.float32))
        trunk = None
        if tree.trunk_scored is not None:
            values = [self.log_prob(tree.trunk, k) for k in range(len(tree.trunk))]
            trunk = np.where(tree.trunk_scored, np.array(values, np.float32), np.float32(0))
        return TreeLogProbs(branches=tuple(branches), trunk=trunk)


class KnowsOneText(PathScorer):
    """Finds tokens likely that stand behind a text, given as character codes, or in it; no other ones."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def log_prob(self, path: IntArray, index: int) -> float:
        recent = "".join(chr(c) for c in path[: index + 1].tolist())
        return -1.0 if self._text in recent[-len(self._text) - 12 :] else -9.0


def group_of(uid: str, *queries: Sequence[str], golds: tuple[str, ...] = ("Bolton",)) -> Group:
    question = make_question(uid, golds=golds)
    plain = [
        make_trajectory(question, sample=i, queries=tuple(q), answer=f"x{i}") for i, q in enumerate(queries)
    ]
    return Group(question=question, trajectories=tuple(with_documents(t) for t in plain))


def with_documents(trajectory: Trajectory) -> Trajectory:
    """Return the trajectory with different results for every query."""

    def read(turn: Turn) -> Turn:
        if not turn.observations:
            return turn
        text = f"What is known about {turn.action.text}."
        passages = (Passage(id=text, title="", text=text, score=1.0),)
        return replace(
            turn,
            observations=(Observation(text=text, passages=passages),),
            observation_ids=np.array([ord(c) for c in text], np.int32),
        )

    return replace(trajectory, turns=tuple(map(read, trajectory.turns)))


def make(name: str, scorer: PathScorer, **settings: object) -> Algorithm:
    method = make_method(name, entailment=Judge(), **settings)
    method.services = replace(method.services, policy=scorer, frozen=scorer)
    return method


async def gains_of(method: Algorithm, groups: Sequence[Group]) -> list[list[Gain]]:
    return (await method.measure(groups, prefetch=Prefetch())).gains


GROUPS = (
    group_of("nq/0", ("a", "b"), (), ("c",)),
    group_of("nq/1", ("d",), ("e", "f", "g"), golds=("Leeds", "York")),
    group_of("nq/2", ("h",), ()),
)


@pytest.mark.parametrize("name", LOG_PROB_METHODS)
async def test_gains_do_not_depend_on_the_order_of_the_batch(name: str) -> None:
    plain = await gains_of(make(name, PathScorer()), GROUPS)
    shuffled = list(range(len(GROUPS)))
    random.Random(3).shuffle(shuffled)
    moved = await gains_of(make(name, PathScorer()), [GROUPS[i] for i in shuffled])
    assert moved == [plain[i] for i in shuffled]
    assert any(gain.values for of_group in plain for gain in of_group)


@pytest.mark.parametrize("name", LOG_PROB_METHODS)
async def test_a_gain_per_search_and_none_on_the_last_turn(name: str) -> None:
    gains = await gains_of(make(name, PathScorer()), GROUPS)
    for group, of_group in zip(GROUPS, gains, strict=True):
        for trajectory, gain in zip(group.trajectories, of_group, strict=True):
            assert gain.failure is None
            *searches, last = gain.turns or [None] * len(trajectory.turns)
            assert len(searches) == len(trajectory.observations)
            assert None not in searches
            assert (last is None) == (name != "siop")  # which has a bonus there


async def test_the_gains_of_igpo_telescope_and_use_one_answer_in_all_states() -> None:
    scorer = PathScorer()
    method = make("igpo", scorer)
    gains = await gains_of(method, GROUPS)
    trajectory = GROUPS[1].trajectories[1]
    wrapper = method.answer_wrapper
    before = [ord(c) for c in wrapper.partition("{answer}")[0]]

    def belief(answer: str, length: int) -> float:
        ids = [ord(c) for c in answer]
        path = np.array([*trajectory.token_ids[:length], *before, *ids], np.int32)
        return float(np.mean([scorer.log_prob(path, k) for k in range(len(path) - len(ids), len(path))]))

    lengths = np.cumsum(
        [len(trajectory.prompt_ids), *(len(t.output_ids) + len(t.observation_ids) for t in trajectory.turns)]
    )[:-1].tolist()
    best = max(("Leeds", "York"), key=lambda answer: belief(answer, lengths[-1]))
    expected = belief(best, lengths[-1]) - belief(best, lengths[0])
    assert math.fsum(gains[1][1].values) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LOG_PROB_METHODS)
@pytest.mark.parametrize(
    ("opened", "expected"), [("", "<think> Yes.</think>"), ("<think>\n", " Yes.</think>")]
)
async def test_a_thought_is_opened_once(name: str, opened: str, expected: str) -> None:
    """The answer's wrapper begins with a thought; a prompt that has opened it must not have a second one."""
    groups = []
    for uid, query in (("nq/6", "a"), ("nq/7", "b")):  # other documents for ig_search
        group = group_of(uid, (query,))
        ids = [*group.trajectories[0].prompt_ids.tolist(), *map(ord, opened)]
        trajectory = replace(group.trajectories[0], prompt_ids=np.array(ids, np.int32))
        groups.append(replace(group, trajectories=(trajectory,)))
    scorer = PathScorer()
    method = make(name, scorer, answer_wrapper="<think> Yes.</think><answer>{answer}</answer>")
    await gains_of(method, groups)
    texts = ["".join(map(chr, branch.ids)) for tree in scorer.asked for branch in tree.branches]
    assert len(texts) >= 4
    for text in texts:  # `ig_search` has documents before it
        assert f"{expected}<answer>" in text
        assert text.count("<think>") == expected.count("<think>")
    # `tips` scores the answer with its tags, all others the answer alone, and none the thought.
    scored = {
        "".join(chr(c) for c in branch.ids[slice(*branch.scored)].tolist())
        for tree in scorer.asked
        for branch in tree.branches
    }
    is_tips = name == "tips"
    assert all(text.startswith("<answer>") == is_tips and "Yes" not in text for text in scored)


async def test_old_log_probs_come_from_the_same_pass() -> None:
    scorer = PathScorer(scores_trajectories=True)
    measurement = await make("igpo", scorer).measure(GROUPS, prefetch=Prefetch())
    assert measurement.old_log_probs is not None
    assert len(scorer.asked) == sum(len(group.trajectories) for group in GROUPS)
    for group, of_group in zip(GROUPS, measurement.old_log_probs, strict=True):
        for trajectory, log_probs in zip(group.trajectories, of_group, strict=True):
            assert log_probs.shape == trajectory.token_ids.shape
            assert (log_probs[~trajectory.policy_mask] == 0).all()
            assert (log_probs[trajectory.policy_mask] != 0).any()


@pytest.mark.parametrize("name", LOG_PROB_METHODS)
async def test_a_failed_trajectory_asks_for_nothing(name: str) -> None:
    question = make_question("nq/9")
    failed = replace(
        make_trajectory(question, queries=("q",), answer="x"), stop=Stop.FAILED, failure="search_failed: x"
    )
    scorer = PathScorer()
    groups = [Group(question=question, trajectories=(failed,)), *GROUPS]
    gains = await gains_of(make(name, scorer), groups)
    assert not gains[0][0].values
    assert gains[0][0].failure is None
    assert not scorer.asked[0].branches


async def test_an_answer_without_tokens_is_a_failed_measurement() -> None:
    gains = await gains_of(make("igpo", PathScorer()), [group_of("nq/5", ("a",), golds=(" ",))])
    assert gains[0][0].failure == "gain_failed: no answer has a token of its own"


async def test_counterfactual_documents_come_from_other_questions_and_move_together_with_the_summary() -> (
    None
):
    scorer = PathScorer()
    await gains_of(make("ig_search", scorer), GROUPS)
    own = {
        group.question.uid: {
            tuple(turn.observation_ids.tolist()) for t in group.trajectories for turn in t.turns
        }
        for group in GROUPS
    }
    trees = iter(scorer.asked)
    for group in GROUPS:
        for trajectory in group.trajectories:
            tree = next(trees)
            ends = np.cumsum([len(turn.output_ids) + len(turn.observation_ids) for turn in trajectory.turns])
            states = len(trajectory.prompt_ids) + ends
            others = [branch for branch in tree.branches if branch.start not in states]
            assert len(others) == 3 * len(trajectory.observations)
            for branch in others:
                uids = {
                    uid
                    for uid, seen in own.items()
                    if any(ids and tuple(branch.ids[: len(ids)].tolist()) == ids for ids in seen)
                }
                assert uids
                assert group.question.uid not in uids


async def test_without_another_question_a_search_has_no_gain() -> None:
    gains = await gains_of(make("ig_search", PathScorer()), GROUPS[:1])
    assert not any(gain.values for gain in gains[0])


def with_query(trajectory: Trajectory, *lengths: int) -> Trajectory:
    """Return the trajectory with queries of these numbers of tokens."""
    turns = []
    for turn, length in zip(trajectory.turns, lengths, strict=False):
        ids = np.arange(10, 12 + length, dtype=np.int32)
        span = Span(kind=SpanKind.QUERY, start=1, end=1 + length, text="q")
        turns.append(
            replace(
                turn,
                output_ids=ids,
                output_log_probs=np.zeros(len(ids), np.float32),
                action=replace(turn.action, spans=(span,)),
            )
        )
    return replace(trajectory, turns=(*turns, *trajectory.turns[len(lengths) :]))


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((0.0, 0.0, 0.0), (0.034553, -0.021848, 0.0)),  # every answer wrong: the queries keep a gradient
        ((1.0, 0.0, 0.0), (1.189252, 1.132850, 1.154699)),
    ],
)
def test_ig_search_credits_query_tokens_alone(
    outcomes: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    question: Question = make_question("nq/7")
    first = with_query(make_trajectory(question, queries=("a", "b"), answer="x"), 6, 4)
    others = [make_trajectory(question, sample=i, answer="x") for i in (1, 2)]
    scores = [
        Score(outcome=outcomes[0], gain=Gain(turns=(0.85, -0.6, None))),
        *(Score(outcome=o) for o in outcomes[1:]),
    ]
    group = Group(question=question, trajectories=(first, *others))
    credit = make_method("ig_search").credit([group], [scores])[0][0]
    start = len(first.prompt_ids)
    after_first = start + len(first.turns[0].output_ids) + len(first.turns[0].observation_ids)
    queries = np.zeros(len(credit.advantages), np.bool_)
    queries[start + 1 : start + 7] = queries[after_first + 1 : after_first + 5] = True
    np.testing.assert_allclose(credit.advantages[start + 1 : start + 7], expected[0], atol=1e-6)
    np.testing.assert_allclose(credit.advantages[after_first + 1 : after_first + 5], expected[1], atol=1e-6)
    np.testing.assert_allclose(credit.advantages[first.policy_mask & ~queries], expected[2], atol=1e-6)
    assert not credit.advantages[~first.policy_mask].any()


@pytest.mark.parametrize(
    ("tools", "num_states"), [(["python"], 3), (["search"], 3), (["python", "search"], 4), (["other"], 0)]
)
async def test_gains_of_chosen_tools_only_and_no_state_that_none_of_them_needs(
    tools: list[str], num_states: int
) -> None:
    plain = group_of("nq/0", ("a", "b", "c"))
    (trajectory,) = plain.trajectories
    first = trajectory.turns[0]
    call = replace(first.action, calls=(replace(first.action.calls[0], tool="python"),))
    mixed = replace(trajectory, turns=(replace(first, action=call), *trajectory.turns[1:]))
    groups = [replace(plain, trajectories=(mixed,))]
    scorer = PathScorer()
    ((gain,),) = await gains_of(make("igpo", scorer, gain_tools=tools), groups)
    ((whole,),) = await gains_of(make("igpo", PathScorer()), groups)
    chosen = [turn.action.calls[0].tool in tools for turn in mixed.turns[:-1]]
    expected = [value if is_chosen else None for value, is_chosen in zip(whole.turns, chosen, strict=False)]
    assert list(gain.turns[:-1]) == (expected if any(chosen) else [])
    # The states around a chosen turn, and the last one, which says which gold answer is scored.
    assert len(scorer.asked[0].branches) == num_states


async def test_stepsearch_pays_new_support_and_takes_off_repeats() -> None:
    question = replace(make_question("nq/0"), supporting_ids=("p1", "p2"))
    found = [Passage(id=i, title="", text=i, score=1.0) for i in ("p1", "p2", "p9")]
    plain = make_trajectory(question, queries=("a", "b", "c"), answer="x")
    turns = [
        replace(turn, observations=(replace(turn.observations[0], passages=tuple(of_one)),))
        for turn, of_one in zip(plain.turns, ([found[0]], [found[0], found[1]], [found[2]]), strict=False)
    ]
    trajectory = replace(plain, turns=(*turns, plain.turns[-1]))
    method = make_method("stepsearch")
    gains = await gains_of(method, [Group(question=question, trajectories=(trajectory,))])
    assert gains[0][0].turns == pytest.approx((0.5, 0.5 - 0.5, 0.0, None))
    unknown = Group(question=make_question("nq/1"), trajectories=GROUPS[0].trajectories)
    assert set((await gains_of(method, [unknown]))[0]) == {Gain()}


@pytest.mark.parametrize("name", LOG_PROB_METHODS)
async def test_answers_are_scored_in_the_text_that_is_asked_for(name: str) -> None:
    wrapper = "<think> I am not sure.</think><answer> {answer}"
    scorer = KnowsOneText(wrapper.partition("{answer}")[0])
    means = []
    for asked in (wrapper, None):  # None: as published
        method = make(name, scorer, answer_wrapper=asked)
        measured = await method.measure(GROUPS, prefetch=Prefetch())
        means.append(measured.stats["ig/answer_log_prob_mean"])
    assert means[1] == -9.0
    # `tips` scores all of the text, which the scorer finds unlikely up to its end.
    assert means[0] > (-8.5 if name == "tips" else -1.5)

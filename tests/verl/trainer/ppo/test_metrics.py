from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import make_question, make_trajectory, make_turn
from tests.methods import make_method
from verl.trainer.ppo.metrics import (
    count_ungraded,
    credit_metrics,
    finite,
    gain_metrics,
    length_by_outcome,
    outcome_metrics,
    repetition_share,
    reward_metrics,
    rollout_metrics,
    step_metrics,
)
from verl.types import (
    ActionKind,
    Credit,
    Finish,
    Gain,
    Group,
    Score,
    ScoredGroups,
    Span,
    SpanKind,
    Stop,
    ToolCall,
    Trajectory,
)

QUESTION = make_question()
AREAS = {"rollout", "reward", "ig", "credit", "policy", "time", "perf"}


def score_group(
    trajectories: Sequence[Trajectory], scores: Sequence[Score], *, method: str = "inforeasoner"
) -> ScoredGroups:
    groups = [Group(question=QUESTION, trajectories=tuple(trajectories))]
    return ScoredGroups(groups=groups, scores=[scores], credits=make_method(method).credit(groups, [scores]))


def gained(value: float) -> Gain:
    return Gain(trajectory=value)


def test_what_the_policy_did() -> None:
    trajectories = [
        make_trajectory(QUESTION, queries=("Bolton", " bolton "), answer="x"),
        make_trajectory(QUESTION, answer="x"),
        make_trajectory(QUESTION, queries=("a",)),
        make_trajectory(QUESTION, queries=("a",), failure="search_failed: HTTP 500"),
    ]
    metrics = rollout_metrics(trajectories)
    assert metrics["rollout/trajectories"] == 4
    assert metrics["rollout/failed_share"] == 0.25
    assert metrics["rollout/failures_search_failed"] == 1
    assert metrics["rollout/searches_mean"] == 1.0
    assert metrics["rollout/no_search_share"] == pytest.approx(1 / 3)
    assert metrics["rollout/distinct_query_share"] == pytest.approx(2 / 3)
    assert metrics["rollout/finished_share"] == pytest.approx(2 / 3)
    assert metrics["rollout/budget_stops"] == 1
    assert metrics["rollout/valid_action_share"] == 1.0
    assert metrics["rollout/response_length_mean"] == pytest.approx((12 + 4 + 4) / 3)
    assert metrics["rollout/response_length_max"] == 12


def test_mask_coverage_of_the_worked_example() -> None:
    turns = (
        make_turn(ActionKind.TOOL, "q", outputs=18, observed=60),
        make_turn(ActionKind.INVALID, outputs=15, observed=55),
        make_turn(ActionKind.ANSWER, "x", outputs=12),
    )
    trajectory = Trajectory(
        question=QUESTION, sample=0, prompt_ids=np.zeros(9, np.int32), turns=turns, stop=Stop.ANSWERED
    )
    metrics = rollout_metrics([trajectory])
    assert metrics["rollout/mask_coverage"] == 0.28125
    assert metrics["rollout/valid_action_share"] == pytest.approx(2 / 3)
    assert metrics["rollout/empty_search_share"] == 1.0


def test_completions_cut_at_the_limit_are_counted_apart_from_malformed_ones() -> None:
    invalid, call = make_turn(ActionKind.INVALID), make_turn(ActionKind.TOOL, "q", observed=9)
    empty = np.zeros(0, np.int32)
    turns = (invalid, replace(invalid, finish=Finish.LENGTH), call, replace(call, observation_ids=empty))
    trajectory = Trajectory(question=QUESTION, sample=0, prompt_ids=empty, turns=turns, stop=Stop.LENGTH)
    metrics = rollout_metrics([trajectory])
    assert metrics["rollout/malformed_actions"] == metrics["rollout/cut_completions"] == 1
    assert metrics["rollout/overflowed_observations"] == 1
    assert metrics["rollout/searches_mean"] == 2


def test_rewards_are_those_trained_on_and_measures_those_of_everything_judged() -> None:
    scores = [
        Score(outcome=1.0, gain=gained(0.5), metrics={"em": 1.0}),
        Score(outcome=0.0, metrics={"em": 0.0}),
        Score(outcome=1.0, failure="gain_failed: x", metrics={"em": 1.0}),
        Score(outcome=None, failure="search_failed: x"),
    ]
    trajectories = [make_trajectory(QUESTION, sample=i, answer="x") for i in range(4)]
    metrics = reward_metrics(score_group(trajectories, scores).samples()) | outcome_metrics(scores)
    assert metrics["reward/mean"] == pytest.approx(0.65)
    assert (metrics["reward/min"], metrics["reward/max"]) == (0.0, pytest.approx(1.3))
    assert metrics["reward/em_mean"] == pytest.approx(2 / 3)
    assert metrics["reward/outcome_mean"] == pytest.approx(2 / 3)
    assert metrics["reward/failed_share"] == 0.5


def test_gains_are_over_what_was_measured() -> None:
    trajectories = [make_trajectory(QUESTION, answer="x") for _ in range(4)]
    trajectories.append(make_trajectory(QUESTION, failure="search_failed: x"))
    scores = [
        Score(outcome=1.0, gain=gained(0.4)),
        Score(outcome=1.0, gain=gained(-0.2)),
        Score(outcome=1.0),
        Score(outcome=1.0, failure="gain_failed: x"),
        Score(outcome=None, failure="search_failed: x"),
    ]
    metrics = gain_metrics(list(zip(trajectories, scores, strict=True)))
    assert metrics == {
        "ig/gain_mean": pytest.approx(0.1),
        "ig/gain_min": -0.2,
        "ig/gain_max": 0.4,
        "ig/positive_share": 0.5,
        "ig/measured_share": 0.5,
        "ig/failed_share": pytest.approx(1 / 3),
        "ig/failures_gain_failed": 1,
    }


def test_what_was_not_measured_is_absent_not_zero() -> None:
    trajectory = make_trajectory(QUESTION, answer="x")
    metrics = gain_metrics([(trajectory, Score(outcome=1.0))])
    assert metrics == {"ig/measured_share": 0.0}
    failed = score_group([trajectory], [Score(outcome=None, failure="x")])
    assert "reward/mean" not in reward_metrics(failed.samples())
    assert rollout_metrics([]) == {
        "rollout/trajectories": 0,
        "rollout/budget_stops": 0,
        "rollout/length_stops": 0,
        "rollout/truncated_observations": 0,
        "rollout/overflowed_observations": 0,
        "rollout/dropped_observations": 0,
        "rollout/malformed_actions": 0,
        "rollout/cut_completions": 0,
    }


def test_answers_without_a_verdict_are_counted_by_name() -> None:
    played = [
        (make_trajectory(QUESTION, answer="x"), Score(outcome=1.0)),
        (make_trajectory(QUESTION, answer="x"), Score(outcome=None, failure="math_failed: no verdict")),
        (
            make_trajectory(QUESTION, failure="search_failed: x"),
            Score(outcome=None, failure="search_failed: x"),
        ),
    ]
    assert count_ungraded(played) == {"reward/failures_math_failed": 1.0}
    assert "ig/failures_math_failed" not in gain_metrics(played)


def test_gains_of_turns_have_a_mean_for_each_tool_and_queries_count_one_by_one() -> None:
    trajectory = make_trajectory(QUESTION, queries=("a", "b", "c"), answer="x")
    first, second, third, last = trajectory.turns
    twice = first.action.calls * 2  # two queries in one call
    turns = (
        replace(first, action=replace(first.action, calls=twice), observations=first.observations * 2),
        replace(second, action=replace(second.action, calls=(ToolCall(tool="python", arguments={}),))),
        replace(third, observations=()),  # not executed: the last turn of a budget
        last,
    )
    played = replace(trajectory, turns=turns)
    assert rollout_metrics([played])["rollout/searches_mean"] == 3
    gained = [
        (played, Score(outcome=1.0, gain=Gain(turns=values))) for values in ((0.5, -0.2, 0.9, None), ())
    ]
    failed = (played, Score(outcome=None, gain=Gain(turns=(9.0, 9.0, 9.0, 9.0)), failure="x"))
    metrics = gain_metrics([*gained, failed])
    assert (metrics["ig/gain_search_mean"], metrics["ig/gain_python_mean"]) == (0.5, -0.2)
    whole = gain_metrics([(played, Score(outcome=1.0, gain=Gain(trajectory=0.5)))])
    assert not {"ig/gain_search_mean", "ig/gain_python_mean"} & whole.keys()


def test_gains_of_turns_count_one_by_one_and_components_have_means() -> None:
    trajectories = [make_trajectory(QUESTION, sample=i, queries=("a", "b"), answer="x") for i in range(2)]
    scores = [
        Score(outcome=1.0, gain=Gain(turns=(0.5, None, -0.1))),
        Score(outcome=0.0, gain=Gain(turns=(0.2, 0.0, None))),
    ]
    scored = score_group(trajectories, scores, method="search_r1")
    gains = gain_metrics(list(zip(trajectories, scores, strict=True)))
    assert gains["ig/gain_mean"] == pytest.approx(0.15)
    of_turns = [gains[f"ig/gain_turn_{number}_mean"] for number in (1, 2, 3)]
    assert of_turns == pytest.approx([0.35, 0.0, -0.1])
    credits = [
        replace(credit, components={**credit.components, "gain": 0.5, "turn_reward": score.gain.turns})
        for credit, score in zip(scored.credits[0], scores, strict=True)
    ]
    metrics = credit_metrics(replace(scored, credits=[credits]))
    assert metrics["credit/turn_reward_mean"] == pytest.approx(0.15)
    # Reward, outcome and gain have metrics of their own.
    own = {name for name in metrics if name.endswith("_mean") and not name.startswith("credit/advantage_")}
    assert own == {"credit/turn_reward_mean"}


def test_advantages_are_counted_by_kind_of_token() -> None:
    """Over two sampled turns of 4 tokens; a failed trajectory counts nowhere."""
    thought = Span(kind=SpanKind.THINK, start=0, end=1, text="hm")
    query = Span(kind=SpanKind.QUERY, start=2, end=4, text="q")
    trajectory = make_trajectory(QUESTION, queries=("q",), answer="x")
    call, answer = trajectory.turns
    call = replace(call, action=replace(call.action, spans=(thought, query)))
    trajectory = replace(trajectory, turns=(call, answer))
    advantages = np.array([0, 0, 0, 0.5, -1, 2, 4, *[0] * 5, 3, -3, 3, -3], np.float32)
    scored = score_group([trajectory, trajectory], [Score(outcome=1.0), Score(outcome=None, failure="x")])
    credits = [[Credit(advantages=a, components={}) for a in (advantages, advantages * 100)]]
    metrics = credit_metrics(replace(scored, credits=credits))
    kinds = {name: value for name, value in metrics.items() if name.startswith("credit/advantage_")}
    assert kinds == {
        "credit/advantage_peak_mean": 4.0,
        "credit/advantage_abs_max": 4.0,
        "credit/advantage_think_mean": 0.5,
        "credit/advantage_think_abs_mean": 0.5,
        "credit/advantage_query_mean": 3.0,
        "credit/advantage_query_abs_mean": 3.0,
        "credit/advantage_other_mean": pytest.approx(-0.2),
        "credit/advantage_other_abs_mean": pytest.approx(2.6),
    }


@pytest.mark.parametrize(
    ("queries", "question", "share"),
    [
        (("where is Bolton",), "Where?", 1.0),
        (("where is Boltonia",), "Where?", 0.0),
        (("the bolton, england",), "Is it Bolton or Leeds?", 0.0),
        (("the band", "Bolton band"), "Where?", 0.5),
        (("about Bolton", "Bolton band"), "Where?", 0.5),
        ((), "Where?", None),
    ],
)
def test_a_gold_answer_in_a_query_counts_unless_it_was_read(
    queries: tuple[str, ...], question: str, share: float | None
) -> None:
    """The passage that a query finds is titled like the query: what it names has been read from then on."""
    trajectory = make_trajectory(make_question(text=question), queries=queries, answer="x")
    assert rollout_metrics([trajectory]).get("rollout/gold_in_query_share") == share


@pytest.mark.parametrize(
    ("completions", "share"),
    [
        ([[1, 2, 3, 4, 5]], 0.0),
        ([[7] * 8], 0.8),  # five times the same four tokens in a row
        ([[1, 2, 1, 2, 1, 2]], pytest.approx(1 / 3)),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0.0),  # in another completion
        ([[1, 2, 3]], None),
    ],
)
def test_repetition_within_completions(completions: list[list[int]], share: float | None) -> None:
    assert repetition_share([np.array(ids, np.int32) for ids in completions]) == share


def test_length_by_outcome() -> None:
    trajectories = [make_trajectory(QUESTION, answer="x", outputs=n) for n in (4, 10, 20, 99)]
    scores = [
        Score(outcome=0.1, metrics={"em": 1.0}),
        Score(outcome=0.9, metrics={"em": 0.0}),
        Score(outcome=0.5),
        Score(outcome=None, failure="x"),
    ]
    assert length_by_outcome(list(zip(trajectories, scores, strict=True))) == {
        "rollout/response_length_right_mean": 4.0,
        "rollout/response_length_wrong_mean": 15.0,
    }


def test_zero_advantage_and_lone_groups() -> None:
    valid, failed = Score(outcome=1.0), Score(outcome=None, failure="x")
    pair = Group(
        question=QUESTION,
        trajectories=tuple(make_trajectory(QUESTION, sample=i, answer="x") for i in range(2)),
    )

    def credit(peak: float) -> Credit:
        return Credit(advantages=np.array([0.0, peak], np.float32), components={})

    scored = ScoredGroups(
        groups=[pair] * 4,
        scores=[[valid, valid], [valid, valid], [valid, failed], [failed, failed]],
        credits=[[credit(1.5), credit(-0.5)], *[[credit(0.0)] * 2] * 3],
    )
    metrics = credit_metrics(scored)
    # The group in which all failed has no advantage to be 0.
    assert metrics["credit/zero_advantage_share"] == pytest.approx(2 / 3)
    assert metrics["credit/lone_group_share"] == pytest.approx(2 / 4)
    assert metrics["credit/advantage_peak_mean"] == pytest.approx((1.5 + 0.5) / 5)
    assert metrics["credit/advantage_abs_max"] == 1.5


def test_a_step_is_named_by_area_and_finite() -> None:
    trajectories = tuple(
        make_trajectory(QUESTION, sample=i, queries=("q",), answer="Bolton" if i else "x") for i in range(3)
    )
    scores = [
        Score(outcome=float(i > 0), gain=gained(0.1 * i), metrics={"em": float(i > 0)}) for i in range(3)
    ]
    stats = {"perf/gain_visible_s": 0.25, "perf/gain_hidden_s": 1.5}
    metrics = step_metrics(
        replace(score_group(trajectories, scores), stats=stats),
        update={"kl": 0.01, "loss": math.nan},
        seconds={"rollout": 0.5, "step": 4.0},
        rollout_s=2.0,
    )
    assert {name.split("/")[0] for name in metrics} == AREAS
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["policy/kl"] == 0.01
    assert "policy/loss" not in metrics
    assert metrics["time/rollout_s"] == 0.5
    assert (metrics["perf/gain_visible_s"], metrics["perf/gain_hidden_s"]) == (0.25, 1.5)
    assert metrics["perf/sampled_tokens_per_s"] == 3 * 8 / 2.0
    assert metrics["perf/tokens_per_s"] == 3 * (3 + 8 + 5) / 4.0


def test_finite_leaves_out_and_names(caplog: pytest.LogCaptureFixture) -> None:
    assert finite({"a/x": None, "b/y": math.inf, "c/z": 1}) == {"c/z": 1.0}
    assert "b/y" in caplog.text

"""Properties of every method, and the credit of `search_r1` and `inforeasoner`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import make_question, make_trajectory
from tests.methods import credit_group, make_method
from verl.algorithms import ALGORITHMS
from verl.algorithms.ig_search import find_steps
from verl.algorithms.statistics import group_advantages
from verl.algorithms.stepsearch import measure_searches
from verl.errors import ConfigError
from verl.types import Gain, Observation, Score, ToolCall, Trajectory


def play(*outcomes: tuple[float | None, float | None, str | None]) -> tuple[list[Trajectory], list[Score]]:
    """Return trajectories of 0, 1, 2, ... searches with these outcomes, gains and failures."""
    question = make_question()
    trajectories = [
        make_trajectory(question, sample=i, queries=("q",) * i, answer="x") for i in range(len(outcomes))
    ]
    return trajectories, [Score(outcome=o, gain=Gain(trajectory=g), failure=f) for o, g, f in outcomes]


@pytest.mark.parametrize(
    ("method", "settings", "rewards"),
    [
        ("search_r1", {}, [1.0, 0.0, 0.0, 0.0]),
        ("inforeasoner", {}, [1.12, 0.30, 0.0, -0.06]),  # outcome + 0.6 * gain
        ("inforeasoner", {"gain_weight": 0.0}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_every_policy_token_gets_the_advantage_of_the_reward_and_no_other_token(
    method: str, settings: dict[str, float], rewards: list[float]
) -> None:
    trajectories, scores = play((1.0, 0.2, None), (0.0, 0.5, None), (0.0, None, None), (0.0, -0.1, None))
    credits = credit_group(make_method(method, **settings), trajectories, scores)
    assert [credit.components["reward"] for credit in credits] == pytest.approx(rewards)
    assert [credit.components["outcome"] for credit in credits] == [1.0, 0.0, 0.0, 0.0]
    for trajectory, credit, advantage in zip(trajectories, credits, group_advantages(rewards), strict=True):
        array = credit.advantages
        assert array.dtype == np.float32
        assert len(array) == len(trajectory.token_ids)
        np.testing.assert_allclose(array[trajectory.policy_mask], np.float32(advantage), rtol=1e-6)
        np.testing.assert_array_equal(array[~trajectory.policy_mask], 0.0)


@pytest.mark.parametrize("method", sorted(ALGORITHMS))
def test_failures_are_masked_whatever_numbers_they_carry(method: str) -> None:
    trajectories, scores = play(
        (1.0, None, "gain_failed: x"), (None, None, "search_failed: y"), (0.0, 0.1, None)
    )
    credits = credit_group(make_method(method), trajectories, scores)
    assert not any(credit.advantages.any() for credit in credits)
    assert [credit.components["reward"] is None for credit in credits] == [True, True, False]


@pytest.mark.parametrize(
    ("method", "settings", "ignored"),
    [
        ("tips", {}, "norm_adv_by_std_in_grpo=False"),
        ("stepsearch", {}, "norm_adv_by_std_in_grpo=False"),
        ("gigpo", {}, "norm_adv_by_std_in_grpo=False"),
        ("inforeasoner", {"granularity": "turn"}, "norm_adv_by_std_in_grpo=False"),
        ("inforeasoner", {"granularity": "turn"}, "adv_estimator=rloo"),
        ("igpo", {"baseline": "leave_one_out"}, "norm_adv_by_std_in_grpo=False"),
        ("igpo", {"baseline": "leave_one_out"}, "info_gain_norm_mode=joint"),
    ],
)
def test_a_setting_without_effect_is_refused_and_its_default_is_not(
    method: str, settings: dict[str, object], ignored: str
) -> None:
    key, _, value = ignored.partition("=")
    default = getattr(make_method(method, **settings).settings, key)
    make_method(method, **settings, **{key: default})
    with pytest.raises(ConfigError, match=rf"algorithm\.{ignored} has no effect .*set it to {default}"):
        make_method(method, **settings, **{key: False if value == "False" else value})


def test_without_std_the_advantage_is_the_distance_to_the_mean() -> None:
    trajectories, scores = play((1.0, None, None), (0.0, None, None))
    credits = credit_group(make_method("search_r1", norm_adv_by_std_in_grpo=False), trajectories, scores)
    assert [float(credit.advantages.sum()) for credit in credits] == [
        0.5 * trajectories[0].num_policy_tokens,
        -0.5 * trajectories[1].num_policy_tokens,
    ]


def test_the_terminal_term_of_tips_is_scaled_but_does_not_set_the_scale() -> None:
    trajectories, scores = play((0.0, None, None), (0.0, None, None))
    gains = [Gain(turns=(-4.0,)), Gain(turns=(3.0, -2.0))]
    scored = [replace(score, gain=gain) for score, gain in zip(scores, gains, strict=True)]
    credits = credit_group(make_method("tips", terminal=True), trajectories, scored)
    # alpha = 0.11 / 3, and after the other trajectory has stopped, its return is 0
    assert credits[1].components["turn_advantage"] == pytest.approx([0.11 / 3 * 5.0, 0.11 / 3 * -2.0])


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.gain_weight must be at least 0"):
        make_method("inforeasoner", gain_weight=-1)


def test_methods_need_numpy_alone() -> None:
    code = (
        "import sys, verl.algorithms\n"
        "heavy = {'torch', 'vllm', 'ray', 'hydra', 'httpx', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_code_printed_is_no_document() -> None:
    """The policy chooses it: a gain for it could be had by printing the answer."""
    question = replace(make_question(), supporting_ids=("second",))
    searched = make_trajectory(question, queries=("first", "second"), answer="x")
    code, found, last = searched.turns
    call = replace(code.action, calls=(ToolCall(tool="python", arguments={"code": "print('x')"}),))
    code = replace(code, action=call, observations=(Observation(text="x"),))
    found = replace(found, observations=(Observation(text="x", passages=found.passages),))
    trajectory = replace(searched, turns=(code, found, last))
    assert [step.key[2] for step in find_steps(trajectory, min_chars=1)] == [1]
    assert measure_searches(trajectory).turns == (None, 1.0, None)
    empty = replace(searched.turns[0], observations=(Observation(text="nothing found"),))
    assert measure_searches(replace(searched, turns=(empty, found, last))).turns == (0.0, 1.0, None)

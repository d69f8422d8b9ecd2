from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields

import pytest

from verl.trainer.config.alarms import AlarmsConfig
from verl.trainer.config.loading import schema_keys
from verl.trainer.ppo.alarms import Alarms, find_alarms, find_change, make_limits

SETTINGS = AlarmsConfig(steps=3, repeat_steps=4, trend_steps=8)


def make_history(**values: Sequence[float]) -> list[dict[str, float]]:
    """Return the history of metrics, `area__what=values`, one per step."""
    length = max(map(len, values.values()))
    return [
        {name.replace("__", "/"): found[step] for name, found in values.items()} for step in range(length)
    ]


def names_of(
    history: Sequence[Mapping[str, float]], *, settings: AlarmsConfig = SETTINGS, max_turns: int = 3
) -> set[str]:
    limits = make_limits(settings, max_turns=max_turns, max_log_prob_difference=1e-3)
    return {alarm.name for alarm in find_alarms(history, limits, trend_steps=settings.trend_steps)}


SICK = {
    "max_no_search_share": ("rollout/no_search_share", 0.2, 0.95),
    "max_turn_share": ("rollout/turns_mean", 2.4, 3.9),
    "min_distinct_query_share": ("rollout/distinct_query_share", 0.99, 0.5),
    "max_gold_in_query_share": ("rollout/gold_in_query_share", 0.05, 0.4),
    "max_cut_share": ("rollout/cut_share", 0.02, 0.6),
    "max_repetition_share": ("rollout/repetition_share", 0.04, 0.8),
    "max_length_ratio": ("rollout/response_length_mean", 100.0, 320.0),
    "min_entropy_ratio": ("policy/entropy", 0.8, 0.07),
    "max_entropy_ratio": ("policy/entropy", 0.8, 2.6),
    "max_kl": ("policy/kl", 0.1, 3.0),
    "max_ratio_distance": ("policy/ratio_mean", 1.0, 0.8),
    "max_clip_fraction": ("policy/clip_fraction", 0.01, 0.4),
    "max_importance_distance": ("policy/importance_mean", 0.99, 1.2),
    "max_zero_advantage_share": ("credit/zero_advantage_share", 0.5, 1.0),
    "min_answer_log_prob": ("ig/answer_log_prob_mean", -3.7, -11.2),
}
"""Of each limit its metric, a value within it and one beyond."""


def test_every_limit_has_a_case() -> None:
    limits = {field.name for field in fields(AlarmsConfig)} - {"steps", "repeat_steps", "trend_steps"}
    assert limits == SICK.keys()


@pytest.mark.parametrize("setting", SICK)
def test_a_metric_beyond_its_limit_for_some_steps_is_an_alarm(setting: str) -> None:
    metric, healthy, sick = SICK[setting]
    history = [{metric: value} for value in (healthy, sick, sick, sick)]
    (name,) = names_of(history)
    assert name.startswith(f"trainer.alarms.{setting} ")
    assert names_of(history[:-1]) == set()
    assert names_of([*history, {metric: healthy}]) == set()
    off = AlarmsConfig(**{"steps": 3, "trend_steps": 8, setting: None})
    assert names_of(history, settings=off) == set()


def test_a_missing_metric_neither_alarms_nor_ends_an_alarm() -> None:
    history: list[dict[str, float]] = [{"policy/kl": 0.1}, {"policy/kl": 3.0}, {}, {"policy/kl": 3.0}, {}]
    assert names_of(history) == set()
    assert names_of([*history, {"policy/kl": 3.0}]) == {"trainer.alarms.max_kl above"}


def test_a_ratio_to_a_first_value_of_0_is_no_alarm() -> None:
    assert names_of(make_history(policy__entropy=[0.0, 0.5, 0.5, 0.5])) == set()


def test_with_one_call_an_episode_may_use_all_its_turns() -> None:
    assert names_of(make_history(rollout__turns_mean=[2.0] * 4), max_turns=1) == set()


def test_engine_and_trainer_apart_is_an_alarm_after_two_steps() -> None:
    values = [0.5e-3, 2e-3, 0.5e-3, 2e-3, 2e-3]
    history = make_history(policy__log_prob_difference_mean=values)
    assert names_of(history[:4]) == set()
    assert names_of(history) == {"actor_rollout_ref.rollout.max_log_prob_difference above"}
    unlimited = make_limits(SETTINGS, max_turns=3, max_log_prob_difference=None)
    assert find_alarms(history, unlimited, trend_steps=None) == []


RISING, FALLING = [0.1, 0.2, 0.1, 0.2, 0.4, 0.5, 0.4, 0.5], [0.6, 0.5, 0.6, 0.5, 0.3, 0.2, 0.3, 0.2]
NOISE = [0.5, 0.2, 0.6, 0.3, 0.2, 0.5, 0.3, 0.4]


@pytest.mark.parametrize(
    ("gains", "scores", "expected"),
    [
        (RISING, FALLING, True),
        (RISING, RISING, False),
        (FALLING, FALLING, False),
        (RISING, NOISE, False),
        (RISING[1:], FALLING[1:], False),
        ([0.0, *RISING], [0.9, *FALLING], True),
    ],
)
def test_gain_that_rises_while_em_falls_is_an_alarm(
    gains: list[float], scores: list[float], expected: bool
) -> None:
    history = make_history(ig__gain_mean=gains, reward__em_mean=scores)
    assert names_of(history) == ({"trainer.alarms.trend_steps"} if expected else set())


def test_a_change_is_counted_in_standard_errors() -> None:
    # Halves 1, 3 and 4, 6: means 2 and 5, variances 2 and 2, standard error sqrt(4 / 2).
    assert find_change([1.0, 3.0, 4.0, 6.0]) == pytest.approx(3 / 2**0.5)
    assert find_change([1.0, 3.0, 99.0, 4.0, 6.0]) == pytest.approx(3 / 2**0.5)
    assert find_change([1.0] * 4) == 0
    assert find_change([2.0, 2.0, 1.0, 1.0]) == float("-inf")


def make_alarms(history: Sequence[Mapping[str, object]] = ()) -> Alarms:
    return Alarms(SETTINGS, max_turns=3, max_log_prob_difference=1e-3, history=history)


def test_an_alarm_that_lasts_is_repeated_after_some_steps_only() -> None:
    alarms = make_alarms()
    values = [0.1, 3.0, 3.0, 3.0, 3.0, 0.1, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    raised = {step for step, value in enumerate(values) if alarms.observe(step, {"policy/kl": value})}
    assert raised == {3, 8, 12}


def test_a_warning_has_the_value_the_limit_its_key_and_what_to_do() -> None:
    alarms = make_alarms()
    history = make_history(policy__entropy=[0.8, 0.06, 0.06, 0.06])
    (message,) = [
        message for step, metrics in enumerate(history) for message in alarms.observe(step, metrics)
    ]
    assert message == (
        "policy/entropy is 0.06, below 0.08, 0.1 times its first value 0.8, for 3 steps "
        "(trainer.alarms.min_entropy_ratio): the policy hardly explores any more; "
        "lower actor_rollout_ref.actor.optim.lr or raise actor_rollout_ref.actor.entropy_coeff"
    )


def test_advice_names_settings_as_they_are_typed() -> None:
    limits = make_limits(SETTINGS, max_turns=3, max_log_prob_difference=1e-3)
    words = {word for limit in limits for word in re.findall(r"\w+(?:\.\w+)*", limit.advice) if "_" in word}
    assert words - set(schema_keys()) == set()
    assert "actor_rollout_ref.rollout.n_agent" in words


def test_a_resumed_run_is_compared_with_its_first_step() -> None:
    logged: list[dict[str, object]] = [
        {"step": 1, "kind": "train", "policy/entropy": 0.8, "policy/kl": None},
        {"step": 2, "kind": "train", "policy/entropy": 0.07},
        {"step": 3, "kind": "train", "policy/entropy": 0.07},
    ]
    assert make_alarms(logged).observe(4, {"policy/entropy": 0.07})
    assert not make_alarms().observe(4, {"policy/entropy": 0.07})

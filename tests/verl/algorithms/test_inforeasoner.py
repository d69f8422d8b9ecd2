"""The gains of turns, from the beliefs of a scripted IG service."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from IG.messages import GainRequest, GainResult
from tests.fakes import make_question, make_trajectory, make_turn
from tests.methods import credit_group, make_method
from verl.types import ActionKind, Gain, Group, Score, Stop, Trajectory

QUESTION = make_question()


@dataclass
class Believing:
    """Believes as `beliefs` says for each context, "" for none; fails for others."""

    beliefs: Mapping[str, float]
    reports: bool = True
    """Whether it reports beliefs, which a published service does not."""
    timeout_s: float = 5.0
    asked: list[str] = field(default_factory=list)

    def take_work(self) -> dict[str, int]:
        return {}

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        return [await self.submit(request) for request in requests]

    async def submit(self, request: GainRequest) -> GainResult:
        self.asked.append(request.context)
        if request.context not in self.beliefs:
            return GainResult(gain=None, error="no model")
        after, before = self.beliefs[request.context], self.beliefs[""]
        beliefs = {"belief_with_context": after, "belief_no_context": before} if self.reports else {}
        return GainResult(gain=after - before, **beliefs)


def measure(trajectory: Trajectory, service: Believing, **settings: object) -> Gain:
    async def run() -> Gain:
        method = make_method("inforeasoner", ig_service=service, **settings)
        async with aclosing(method.prefetch([QUESTION])) as prefetch:
            prefetch.on_episode_end(trajectory)
            group = Group(question=QUESTION, trajectories=(trajectory,))
            return (await method.measure([group], prefetch=prefetch)).gains[0][0]

    return asyncio.run(run())


BELIEFS = {"": 0.25, "a": 0.5, "a | b": 0.125}
TWO_SEARCHES = make_trajectory(QUESTION, queries=("a", "b"), answer="x")


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({}, (0.25, -0.375, None)),
        ({"turn_baseline": "no_retrieval"}, (0.25, -0.125, None)),
        ({"gain_form": "log_ratio"}, (math.log(2), math.log(1 / 4), None)),
        ({"gain_form": "log_ratio", "gain_clip": 1.0}, (math.log(2), -1.0, None)),
        ({"gain_form": "log_ratio", "gain_floor": 0.3}, (math.log(0.5 / 0.3), math.log(0.3 / 0.5), None)),
        ({"gain_form": "log_ratio", "turn_baseline": "no_retrieval"}, (math.log(2), -math.log(2), None)),
    ],
)
def test_each_turn_is_measured_against_its_baseline(
    settings: dict[str, object], turns: tuple[float | None, ...]
) -> None:
    service = Believing(BELIEFS)
    gain = measure(TWO_SEARCHES, service, granularity="turn", **settings)
    assert gain.turns == pytest.approx(turns)
    assert gain.trajectory is None
    assert sorted(service.asked) == ["", "a", "a | b"]


def test_a_trajectory_has_one_gain_in_either_form() -> None:
    assert measure(TWO_SEARCHES, Believing(BELIEFS)) == Gain(trajectory=-0.125)
    ratio = measure(TWO_SEARCHES, Believing(BELIEFS), gain_form="log_ratio")
    assert ratio.trajectory == pytest.approx(-math.log(2))


def test_turns_without_new_passages_have_no_gain() -> None:
    invalid = make_turn(ActionKind.INVALID, observed=2)
    nothing = make_turn(ActionKind.TOOL, "n", observed=2)
    a, b, answer = TWO_SEARCHES.turns
    trajectory = Trajectory(
        question=QUESTION,
        sample=0,
        prompt_ids=np.zeros(1, np.int32),
        turns=(invalid, a, nothing, b, answer),
        stop=Stop.ANSWERED,
    )
    gain = measure(trajectory, Believing(BELIEFS), granularity="turn")
    assert gain.turns == (None, 0.25, None, -0.375, None)


@pytest.mark.parametrize(
    ("service", "settings", "failure"),
    [
        (Believing({"": 0.25, "a": 0.5}), {"granularity": "turn"}, "gain_failed: no model"),
        (Believing(BELIEFS, reports=False), {"gain_form": "log_ratio"}, "reports no beliefs"),
    ],
)
def test_what_was_not_measured_is_a_named_failure(
    service: Believing, settings: dict[str, object], failure: str
) -> None:
    gain = measure(TWO_SEARCHES, service, **settings)
    assert failure in (gain.failure or "")
    assert gain.values == ()


def test_nothing_is_asked_without_an_answer() -> None:
    service = Believing(BELIEFS)
    assert measure(make_trajectory(QUESTION, queries=("a",)), service, granularity="turn") == Gain()
    assert {*service.asked} <= {""}


@given(
    beliefs=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6),
    form=st.sampled_from(["difference", "log_ratio"]),
)
def test_gains_against_the_previous_state_sum_to_that_of_the_trajectory(
    beliefs: list[float], form: str
) -> None:
    queries = tuple("abcdef"[: len(beliefs) - 1])
    contexts = [" | ".join(queries[:k]) for k in range(len(beliefs))]
    trajectory = make_trajectory(QUESTION, queries=queries, answer="x")
    settings = {"gain_form": form, "gain_clip": 10.0}  # clipping would break the sum
    by_turn, whole = (
        measure(
            trajectory, Believing(dict(zip(contexts, beliefs, strict=True))), granularity=size, **settings
        )
        for size in ("turn", "trajectory")
    )
    assert math.fsum(by_turn.values) == pytest.approx(whole.trajectory, abs=1e-9)


def test_turns_are_credited_with_all_that_came_from_them_on() -> None:
    other = make_trajectory(QUESTION, sample=1, answer="y")
    method = make_method("inforeasoner", granularity="turn", gain_weight=0.5)
    scores = [Score(outcome=1.0, gain=Gain(turns=(0.4, -0.2, None))), Score(outcome=0.0)]
    first, second = credit_group(method, [TWO_SEARCHES, other], scores)
    assert first.components["turn_advantage"] == pytest.approx((1.1, 0.9, 1.0))
    assert second.components["turn_advantage"] == pytest.approx((-1.1,))
    assert first.components["gain"] == (0.4, -0.2, None)

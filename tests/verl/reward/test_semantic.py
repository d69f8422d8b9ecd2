from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.fakes import make_question, make_trajectory, make_turn
from verl.errors import ServiceError
from verl.reward.semantic import SemanticGain
from verl.types import ActionKind, Gain, Group, Stop, Trajectory
from verl.utils.reward_score.IG_client import GainRequest, GainResult

QUESTION = make_question(golds=("Bolton", "Bolton, England"), text="Where?")


@dataclass
class ScriptedClient:
    """Answers with its script, or raises it."""

    script: list[GainResult] | ServiceError
    requests: list[GainRequest] = field(default_factory=list)

    async def compute(self, requests: Sequence[GainRequest]) -> list[GainResult]:
        self.requests += requests
        if isinstance(self.script, ServiceError):
            raise self.script
        return self.script


def titles(trajectory: Trajectory) -> str:
    return " | ".join(passage.title for passage in trajectory.passages)


def estimator(client: ScriptedClient) -> SemanticGain:
    return SemanticGain(client, render_context=titles)


def group(*trajectories: Trajectory) -> Group:
    return Group(question=QUESTION, trajectories=trajectories)


async def test_only_what_searched_found_and_answered_is_asked_about() -> None:
    found_nothing = Trajectory(
        question=QUESTION,
        sample=0,
        prompt_ids=make_turn(ActionKind.ANSWER).output_ids,
        turns=(make_turn(ActionKind.SEARCH, "q", observed=3), make_turn(ActionKind.ANSWER, "Bolton")),
        stop=Stop.ANSWERED,
    )
    client = ScriptedClient([GainResult(gain=0.4, error=None)])
    gains = await estimator(client).measure(
        [
            group(
                make_trajectory(QUESTION, answer="Bolton"),
                make_trajectory(QUESTION, queries=("a", "b"), answer="Paris"),
                make_trajectory(QUESTION, queries=("c",), answer=None),
                make_trajectory(QUESTION, queries=("d",), answer="Bolton", failure="search_failed: down"),
                found_nothing,
            )
        ]
    )
    assert client.requests == [
        GainRequest(question="Where?", context="a | b", golds=("Bolton", "Bolton, England"))
    ]
    assert gains == [[Gain(), Gain(value=0.4), Gain(), Gain(), Gain()]]


async def test_gains_go_to_the_trajectories_that_they_were_measured_on() -> None:
    client = ScriptedClient([GainResult(gain=float(i), error=None) for i in range(3)])
    searched = make_trajectory(QUESTION, queries=("q",), answer="x")
    lazy = make_trajectory(QUESTION, answer="x")
    gains = await estimator(client).measure(
        [group(searched, lazy), group(lazy), group(lazy, searched, searched)]
    )
    assert [[gain.value for gain in of_group] for of_group in gains] == [
        [0.0, None],
        [None],
        [None, 1.0, 2.0],
    ]


async def test_nothing_to_ask_asks_nothing() -> None:
    client = ScriptedClient(ServiceError("IG service", "must not be asked"))
    assert await estimator(client).measure([group(make_trajectory(QUESTION, answer="x"))]) == [[Gain()]]
    assert not client.requests


@pytest.mark.parametrize(
    "script",
    [
        ServiceError("IG service", "no answer within 2 s"),
        [],
        [GainResult(gain=1.0, error=None)] * 3,
        [GainResult(gain=None, error="HTTP 500")] * 2,
        [GainResult(gain=math.nan, error=None)] * 2,
        [GainResult(gain=None, error=None)] * 2,
    ],
    ids=["raises", "short", "long", "error", "nan", "neither"],
)
async def test_a_failed_measurement_is_named_and_has_no_number(
    script: list[GainResult] | ServiceError,
) -> None:
    searched = make_trajectory(QUESTION, queries=("q",), answer="x")
    (gains,) = await estimator(ScriptedClient(script)).measure([group(searched, searched)])
    assert len(gains) == 2
    assert all(g.value is None and (g.failure or "").startswith("gain_failed: ") for g in gains)

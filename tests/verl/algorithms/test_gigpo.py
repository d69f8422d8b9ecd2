"""Which turns of a group share a state."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.conformance.test_reference import SIMILAR
from tests.fakes import make_question, make_trajectory
from verl.algorithms.gigpo import State, cluster, states_before, step_advantages
from verl.types import ActionKind, Observation, Trajectory


def read(text: str) -> State:
    return State(text, tuple(map(ord, text)))


@pytest.mark.parametrize("texts", [*itertools.permutations(SIMILAR)])
def test_states_are_clustered_without_regard_to_the_order_of_the_group(texts: tuple[str, ...]) -> None:
    outcomes = {SIMILAR[0]: 1.0, SIMILAR[1]: 0.0, SIMILAR[2]: 0.5}
    advantages = step_advantages(
        [[State(), read(text)] for text in texts],
        [outcomes[text] for text in texts],
        discount=1.0,
        similarity=0.85,
    )
    found = {text: of_one[1] for text, of_one in zip(texts, advantages, strict=True)}
    # A comes first and takes B; C is like B, but not like A.
    assert [found[text] for text in SIMILAR] == pytest.approx([0.707106, -0.707106, 0.0], abs=1e-6)


def with_reply(text: str, ids: list[int], kind: ActionKind) -> Trajectory:
    """Return a trajectory that read these tokens after its first turn, and this text from its tool."""
    plain = make_trajectory(make_question(), queries=("q",), answer="x")
    first = replace(
        plain.turns[0],
        action=replace(plain.turns[0].action, kind=kind),
        observations=(Observation(text=text),) if kind is ActionKind.TOOL else (),
        observation_ids=np.array(ids, np.int32),
    )
    return replace(plain, turns=(first, *plain.turns[1:]))


def test_an_invalid_action_and_an_empty_result_are_two_states() -> None:
    invalid, empty = with_reply("", [7, 8], ActionKind.INVALID), with_reply("", [5, 6], ActionKind.TOOL)
    found = [states_before(trajectory)[1] for trajectory in (invalid, empty, empty, invalid)]
    first_of = cluster(found, similarity=0.9)
    assert [first_of[state].ids for state in found] == [(7, 8), (5, 6), (5, 6), (7, 8)]

"""A trajectory comes out of its bytes as it went in."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np

from tests.fakes import make_question, make_trajectory
from verl.rollout.packing import pack, unpack
from verl.types import Message


def test_a_trajectory_survives() -> None:
    question = replace(make_question(), messages=(Message(role="user", content="Where?"),))
    trajectory = make_trajectory(question, queries=("a", "b"), answer="c", outputs=4, observed=5)
    restored = unpack(pack(trajectory))
    assert restored.question == question
    assert restored.turns[0].action == trajectory.turns[0].action
    assert restored.turns[0].observations == trajectory.turns[0].observations
    assert np.array_equal(restored.turns[0].output_log_probs, trajectory.turns[0].output_log_probs)
    assert json.dumps(asdict(restored), default=np.ndarray.tolist) == json.dumps(
        asdict(trajectory), default=np.ndarray.tolist
    )

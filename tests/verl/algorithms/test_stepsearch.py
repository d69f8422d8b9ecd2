"""Which passages count as supporting ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fakes import make_question, make_trajectory
from tests.methods import make_method
from verl.algorithms.base import Prefetch
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.algorithms.stepsearch import similarities
from verl.types import Group, Passage

HULL = Passage(id="7", title='"Hull"', text="A port in the north.", score=1.0)
YORK = Passage(id="8", title='"York"', text="A town with walls.", score=1.0)


@pytest.mark.parametrize(
    ("ids", "texts", "expected"),
    [
        (("8", "7"), (), [[0.0, 1.0], [1.0, 0.0]]),
        (("York", "Hull"), (), [[0.0, 1.0], [1.0, 0.0]]),  # titles, where the data has no more
        (("Y", "H"), ("York\nA town with walls.", "Hull\nA port in the north."), [[0.0, 1.0], [1.0, 0.0]]),
        # A title names a whole article: the text identifies the passage of it.
        (("York",), ("York\nIts railway museum opened late.",), [[0.0], [0.2]]),
    ],
)
def test_passages_are_recognized_by_id_by_title_or_by_text(
    ids: tuple[str, ...], texts: tuple[str, ...], expected: list[list[float]]
) -> None:
    question = replace(make_question(), supporting_ids=ids, supporting_texts=texts)
    found = similarities(question, [[HULL], [YORK]])
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=0.1)


async def test_questions_without_known_passages_are_compared_by_their_outcomes_alone() -> None:
    """As those of NQ beside those of HotpotQA: nothing failed, so that the run goes on."""
    groups = []
    answers = ("Bolton", "Leeds")
    for ids in ((), (), ("q",)):
        question = replace(make_question(f"nq/train/{len(groups)}"), supporting_ids=ids)
        attempts = [
            make_trajectory(question, sample=i, queries=("q",), answer=answer)
            for i, answer in enumerate(answers)
        ]
        groups.append(Group(question=question, trajectories=tuple(attempts)))
    reward = Reward(measure_outcome, algorithm=make_method("stepsearch"), max_failure_share=0.2, fix="")
    scored = await reward.score(groups, prefetch=Prefetch())
    assert [score.gain.turns for of_group in scored.scores for score in of_group] == [
        *[()] * 4,
        *[(1.0, None)] * 2,
    ]
    for credits in scored.credits:
        for credit, advantage in zip(credits, (1.0, -1.0), strict=True):
            assert set(credit.advantages[credit.advantages != 0]) == {advantage}

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tests.fakes import make_question, make_trajectory
from tests.methods import make_method
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.trainer.ppo.evaluation import Progress, evaluate
from verl.types import Question, Trajectory

REWARD = Reward(measure_outcome, algorithm=make_method(), max_failure_share=0.0, fix="")


@dataclass
class ScriptedCollector:
    played: list[Trajectory]

    async def evaluate(
        self, questions: Sequence[Question], *, progress: Progress | None = None
    ) -> list[Trajectory]:
        return self.played


async def test_measures_over_all_and_per_data_source_without_the_failed() -> None:
    questions = [make_question(f"{source}/test/{i}") for source in ("nq", "hotpotqa") for i in range(2)]
    played = [
        make_trajectory(questions[0], queries=("q",), answer="Bolton"),
        make_trajectory(questions[1], answer="in Bolton"),
        make_trajectory(questions[2], queries=("q", "r")),
        make_trajectory(questions[3], failure="search_failed: HTTP 500"),
    ]
    result = await evaluate(ScriptedCollector(played[::-1]), REWARD, questions)
    assert list(result.trajectories) == played
    assert result.metrics["val/em"] == pytest.approx(1 / 3)
    assert result.metrics["val/sub_em"] == pytest.approx(2 / 3)
    assert result.metrics["val/f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert result.metrics["val/searches_mean"] == 1.0
    assert result.metrics["val/answer_share"] == pytest.approx(2 / 3)
    assert result.metrics["val/questions"] == 4
    assert result.metrics["val/failed"] == 1
    assert result.metrics["val/failures_search_failed"] == 1
    assert result.metrics["val/em/nq"] == 0.5
    assert result.metrics["val/em/hotpotqa"] == 0.0
    assert result.metrics["val/failed/hotpotqa"] == 1


async def test_if_everything_failed_there_is_no_score() -> None:
    question = make_question()
    played = [make_trajectory(question, failure="generation_failed: x")]
    result = await evaluate(ScriptedCollector(played), REWARD, [question])
    assert "val/em" not in result.metrics
    assert result.metrics["val/failed"] == 1


@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 2, 2], [0, 1, 1], [0, 1, 3]])
async def test_every_question_exactly_once(indices: list[int]) -> None:
    questions = [make_question(f"nq/test/{i}") for i in range(4)]
    played = [make_trajectory(questions[i], answer="x") for i in indices]
    with pytest.raises(ValueError, match="exactly once"):
        await evaluate(ScriptedCollector(played), REWARD, questions[:3])

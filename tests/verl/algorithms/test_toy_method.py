"""A method added as one class in this file: chosen by its name, it measures, credits, and is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.methods import make_method
from tests.trainer_run import STEPS_ALONE, Run, SearchingAgent
from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Algorithm, Measurement, Prefetch
from verl.algorithms.statistics import group_advantages, spread, spread_turns
from verl.run.records import read_records, step_files
from verl.run.report.report import write_report
from verl.run.tracking import read_metrics
from verl.trainer.config.loading import compose_config
from verl.trainer.config.overrides import check_overrides
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import Credit, Gain, Group, Score, Trajectory


@dataclass
class ToyConfig(AlgorithmConfig):
    name: str = "toy"
    bonus: float = 0.5


class Toy(Algorithm):
    """Pays a bonus on the tokens of every turn that found a passage, beside the outcome."""

    settings: ToyConfig
    settings_class = ToyConfig

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        return Measurement(
            gains=[
                [Gain(turns=tuple(float(len(turn.passages)) or None for turn in t.turns)) for t in of_group]
                for of_group in (group.trajectories for group in groups)
            ],
            stats={"perf/toy": 1.0},
        )

    def credit(
        self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
    ) -> list[list[Credit]]:
        credits = []
        for group, of_group in zip(groups, scores, strict=True):
            rewards = [score.outcome if score.failure is None else None for score in of_group]
            advantages = group_advantages(rewards)
            credits.append(
                [
                    self._credit(*parts)
                    for parts in zip(group.trajectories, of_group, rewards, advantages, strict=True)
                ]
            )
        return credits

    def _credit(self, trajectory: Trajectory, score: Score, reward: float | None, advantage: float) -> Credit:
        tokens = spread(trajectory, advantage)
        if reward is not None:
            tokens += spread_turns(
                trajectory, [self.settings.bonus * (gain or 0.0) for gain in score.gain.turns]
            )
        return Credit(advantages=tokens, components={"reward": reward, "found": score.gain.turns})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "toy", Toy)


@pytest.mark.usefixtures("toy")
async def test_one_class_is_chosen_measures_credits_and_is_recorded(tmp_path: Path) -> None:
    config = compose_config(check_overrides(["algorithm=toy", "algorithm.bonus=0.25"]))
    algorithm = ALGORITHMS[config.algorithm.name](config.algorithm, make_method().services)
    run = Run(tmp_path, algorithm=algorithm, agent=SearchingAgent(), **STEPS_ALONE)
    await run.trainer.fit()
    run.tracker.finish()

    line = read_metrics(tmp_path)[0]
    assert line["ig/gain_mean"] == 1.0
    assert line["credit/found_mean"] == 1.0
    assert line["perf/toy"] == 1.0
    assert line["credit/advantage_abs_max"] == 0.25  # every answer is right: the outcomes cancel out
    record = read_records(step_files(tmp_path)[1])[0]
    assert record["turn_gains"] == [1.0, None]
    assert record["components"] == {"reward": 1.0, "found": [1.0, None]}
    assert "turn 1: gain +1.0000" in write_report(tmp_path).read_text()

"""Results of runs that were never done, with numbers chosen by a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comparison.pace import STANDARD_S
from comparison.plan import Method, Plan, Stage, Tuned, World
from comparison.results import Evaluation, Result
from comparison.runs import ROOT, RunSpec

TUNED = Tuned(lr=1e-4, group=5, kl=0.001)
EASY = World(folder=ROOT / "world")


def make_plan(**changes: object) -> Plan:
    """Return a plan of two methods on the easy world."""
    entries: dict[str, object] = {
        "rollouts": 80,
        "evaluate_every": 5,
        "questions": 4,
        "untuned": TUNED,
        "worlds": {"easy": EASY},
        "methods": {
            "search_r1": Method(algorithm="search_r1"),
            "inforeasoner": Method(algorithm="inforeasoner"),
        },
        "stages": {
            "easy": Stage(
                world="easy", steps=10, seeds=2, base="search_r1", methods=["search_r1", "inforeasoner"]
            )
        },
        "ig_service": {"num_generations": 8},
    }
    return Plan(**(entries | changes))  # type: ignore[arg-type]


def make_result(
    run: RunSpec | None = None,
    *,
    em: Sequence[float | None] = (0.1, 0.2),
    searches: Sequence[float | None] | None = None,
    outcomes: Sequence[tuple[int, str]] = ((0, "0000"), (2, "1100")),
    seed: int = 0,
    wall_s: float = 10.0,
    pace_s: float | None = STANDARD_S,
) -> Result:
    """Return a result with these curves; `outcomes` are the evaluations, by step. A step takes 2 s."""
    n = len(em)
    made: list[float | None] = [1.0] * n
    return Result(
        key=run.key if run else "made",
        settings=dict(run.settings)
        if run
        else {"world": "w", "config": {"trainer.seed": seed, "algorithm.name": "search_r1"}},
        rollouts=80,
        wall_s=wall_s,
        processor_s=15.0,
        em=list(em),
        searches=list(made if searches is None else searches),
        no_search=[0.0] * n,
        gain=[0.5] * n,
        entropy=[0.3] * n,
        zero_advantage=[0.0] * n,
        sampled_tokens=[100.0] * n,
        tokens=[1000.0] * n,
        seconds=[2.0] * n,
        evaluations=[Evaluation(step=step, searches=1.0, outcomes=text) for step, text in outcomes],
        manifest={"git": {"sha": "0123456789abcdef", "dirty": False}, "started": "2026-01-01T00:00:00+00:00"},
        pace_s=pace_s,
    )


def write_plan(folder: Path, text: str) -> str:
    """Write a plan file; return its path."""
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)

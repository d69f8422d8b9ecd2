"""A run of a comparison does not depend on the runs before it, with which it shares process and engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1200)]

PLAN = """
rollouts: 12
evaluate_every: 1
questions: 8
untuned: {lr: 1e-3, group: 3, kl: 0.01}
settings: {trainer.launcher: local}
worlds: {easy: {folder: world}}
methods:
  before: {algorithm: igpo, settings: {trainer.seed: 5}, handicap: shuffled_outcomes}
  after: {algorithm: search_r1}
stages:
  both: {world: easy, steps: 2, seeds: 1, methods: [before, after]}
"""
_TIMES = ("time", "perf/", "rollout/episode_seconds")


def compare(plan: Path, *arguments: str) -> str:
    command = [sys.executable, "scripts/compare.py", "--plan", str(plan), "--keep", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def read_run(folder: Path) -> tuple[list[dict[str, object]], list[list[object]]]:
    """Return the metrics of a run without times, and the tokens of all its episodes with their advantages."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = sorted([*folder.glob("trajectories/*"), *folder.glob("evaluation/*")])
    records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    episodes = [
        [r["uid"], r["sample"], r["advantage_runs"], *(turn["output_ids"] for turn in r["turns"])]
        for r in records
    ]
    return [{k: v for k, v in line.items() if not k.startswith(_TIMES)} for line in metrics], episodes


def test_a_run_after_another_one_is_the_run_alone(tmp_path: Path) -> None:
    plan, docs = tmp_path / "two.yaml", tmp_path / "docs"
    plan.write_text(PLAN)
    output = compare(plan, "--docs", str(docs), "--work", str(tmp_path / "after"))
    assert json.loads(output.splitlines()[-1])["done"] == 2
    results = {path.stem: json.loads(path.read_text()) for path in (docs / "comparison/runs").iterdir()}
    (key,) = [
        key
        for key, result in results.items()
        if result["settings"]["config"]["algorithm.name"] == "search_r1"
    ]
    assert len(results[key]["em"]) == 2
    assert [len(evaluation["outcomes"]) for evaluation in results[key]["evaluations"]] == [8, 8, 8]

    output = compare(plan, "--docs", str(docs), "--work", str(tmp_path / "after"), "--verify", key)
    assert "The same run twice" in output
    metrics, episodes = read_run(tmp_path / "after" / key)
    assert len(episodes) == 2 * 12 + 3 * 8
    assert any("policy/loss" in line for line in metrics)
    (again,) = (tmp_path / "after").glob(f"again-*/{key}")
    assert (metrics, episodes) == read_run(again)

"""A step of a method that needs the entailment of the IG service and the policy's log-probs at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.running import read_manifest, read_steps, training

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


def test_siop_trains_on_the_embedded_world(tmp_path: Path, retriever: str, gain_service: str) -> None:
    services = (f"retriever.url={retriever}", f"reward.semantic.url={gain_service}")
    run_dir = tmp_path / "run"
    with training(run_dir, "siop", *services, "trainer.total_training_steps=1") as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert read_manifest(run_dir)["status"] == "completed"
    assert "ig_service" in read_manifest(run_dir)["services"]  # type: ignore[operator]
    step = read_steps(run_dir)[1]
    assert step["reward/failed_share"] == 0
    assert step["policy/grad_norm"] > 0
    lines = (run_dir / "trajectories" / "step_000001.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert bool(record["turn_gains"]) == (record["stop"] == "answered")

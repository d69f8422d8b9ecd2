"""Whole runs with the real parts over real sockets: vLLM, Ray, Faiss, both services, gradients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.e2e.running import DEADLINE_S, ROOT, end_training, read_steps, start_training, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_quickstart_trains_reports_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finished = subprocess.run(
        [sys.executable, "scripts/quickstart.py", "--smoke", "--run-dir", str(run_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads(finished.stdout.splitlines()[-1])
    assert list(summary) == [
        "em_before", "em_after", "gain_first", "gain_last", "steps", "seconds", "peak_rss_gb", "run_dir",
    ]  # fmt: skip
    assert summary["steps"] == 2
    assert 0 <= summary["em_before"] <= 1
    assert 0 <= summary["em_after"] <= 1
    assert summary["gain_first"] is not None
    assert 0 < summary["peak_rss_gb"] < 8

    steps = read_steps(run_dir)
    assert sorted(steps) == [1, 2]
    for step in steps.values():
        assert step["policy/log_prob_difference_mean"] < 1e-3  # rollout and trainer agree, in float32
        assert step["policy/publish_difference"] < 1e-3
        assert step["policy/num_updates"] == 1
        assert step["policy/grad_norm"] > 0
    manifest = json.loads((run_dir / "run_manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert "<svg" in (run_dir / "report.html").read_text()
    assert_records_are_exact(run_dir / "trajectories" / "step_000002.jsonl")
    exported = run_dir / "checkpoints" / "global_step_2" / "huggingface"
    start = load_file(ROOT / "world/models/policy/model.safetensors")
    trained = load_file(exported / "model.safetensors")
    assert any((start[name] != trained[name]).any() for name in start)


def assert_records_are_exact(path: Path) -> None:
    """Every recorded trajectory says which tokens were sampled, with what probability, and its worth."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 20  # 4 questions, 5 attempts
    for record in records:
        sampled = sum(len(turn["output_ids"]) for turn in record["turns"])
        assert sum(record["mask_runs"][1::2]) == sampled
        for turn in record["turns"]:
            assert len(turn["output_ids"]) == len(turn["output_log_probs"])
        if record["failure"] is None:
            assert record["outcome"] is not None


def assert_interrupted(run_dir: Path, *, code: int | None, output: str) -> None:
    assert code == 130, output
    assert "Traceback" not in output
    assert json.loads((run_dir / "run_manifest.json").read_text())["status"] == "interrupted"
    assert (run_dir / "report.html").is_file()


def test_killed_run_resumes_to_the_weights_of_an_unbroken_one_and_signals_end_runs_cleanly(
    tmp_path: Path, retriever: str, gain_service: str
) -> None:
    services = (f"retriever.url={retriever}", f"reward.semantic.url={gain_service}")
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"

    process = start_training(unbroken, *services)
    wait_for(lambda: 5 in read_steps(unbroken), what="step 5", process=process)
    output = end_training(process, lambda: os.killpg(process.pid, signal.SIGINT))  # as a terminal does
    assert_interrupted(unbroken, code=process.returncode, output=output)

    broken = start_training(killed, *services)
    wait_for(lambda: 3 in read_steps(killed), what="step 3", process=broken)
    end_training(broken, lambda: os.killpg(broken.pid, signal.SIGKILL))

    resumed = start_training(killed, *services)
    wait_for(lambda: 5 in read_steps(killed), what="step 5", process=resumed)
    output = end_training(resumed, resumed.terminate)
    assert_interrupted(killed, code=resumed.returncode, output=output)
    assert "global_step_2" in output  # said where it goes on from
    assert list(range(1, 6)) == sorted(read_steps(killed))[:5]

    first, second = (
        load_file(run / "checkpoints/global_step_4/huggingface/model.safetensors")
        for run in (unbroken, killed)
    )
    assert first.keys() == second.keys()
    assert [name for name in first if (first[name] != second[name]).any()] == []

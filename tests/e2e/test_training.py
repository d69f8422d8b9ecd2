"""Whole runs with the real parts over real sockets: vLLM, Ray, Faiss, both services, gradients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from tests.e2e.bare_machine import strip_machine
from tests.e2e.running import ROOT, end_training, read_manifest, read_steps, training, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


def test_quickstart_trains_reports_and_needs_no_more_than_the_readme_says(tmp_path: Path) -> None:
    run_python, obstacle = strip_machine(tmp_path)
    run_dir = tmp_path / "run"
    finished = run_python("scripts/quickstart.py", "--smoke", "--run-dir", str(run_dir))
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
    assert read_manifest(run_dir)["status"] == "completed"
    assert "<svg" in (run_dir / "report.html").read_text()
    assert_records_are_exact(run_dir / "trajectories" / "step_000002.jsonl")
    exported = run_dir / "checkpoints" / "global_step_2" / "huggingface"
    start = load_file(ROOT / "world/models/policy/model.safetensors")
    trained = load_file(exported / "model.safetensors")
    assert any((start[name] != trained[name]).any() for name in start)
    assert_its_checkpoint_answers_as_in_its_evaluation(run_dir)
    if obstacle:
        pytest.skip(f"passed with all that this machine has: {obstacle}")


def assert_its_checkpoint_answers_as_in_its_evaluation(run_dir: Path) -> None:
    """`python -m verl.ask` gives the tokens of the run's last evaluation, with the settings of the run."""
    records = [
        json.loads(line) for line in (run_dir / "evaluation/step_000002.jsonl").read_text().splitlines()
    ]
    asked = subprocess.run(
        [sys.executable, "-m", "verl.ask", "--model", str(run_dir), "--json"],
        input="\n".join(record["question"] for record in records),
        capture_output=True,
        text=True,
        cwd=run_dir,
    )
    assert asked.returncode == 0, asked.stderr
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    for record, answer in zip(records, answers, strict=True):
        parts = [record["prompt_ids"]]
        parts += [ids for turn in record["turns"] for ids in (turn["output_ids"], turn["observation_ids"])]
        assert answer["token_ids"] == [token for ids in parts for token in ids]
        assert (answer["question"], answer["answer"]) == (record["question"], record["answer"])


def assert_records_are_exact(path: Path) -> None:
    """Every recorded trajectory has the sampled tokens, their log-probs, its mask and its outcome."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 20  # 4 questions, 5 attempts
    for record in records:
        sampled = sum(len(turn["output_ids"]) for turn in record["turns"])
        assert sum(record["mask_runs"][1::2]) == sampled
        for turn in record["turns"]:
            assert len(turn["output_ids"]) == len(turn["output_log_probs"])
        if record["failure"] is None:
            assert record["outcome"] is not None


def kill_raylet(trainer: psutil.Process) -> None:
    next(child for child in trainer.children(recursive=True) if child.name() == "raylet").kill()


def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(
    tmp_path: Path, retriever: str, gain_service: str
) -> None:
    """Three runs, each ended in another way: by Ctrl-C, by SIGKILL, and by the death of Ray."""
    services = (f"retriever.url={retriever}", f"reward.semantic.url={gain_service}")
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"

    with training(unbroken, *services) as process:
        wait_for(lambda: 5 in read_steps(unbroken), what="step 5", process=process)
        output = end_training(process, lambda: os.killpg(process.pid, signal.SIGINT))  # as a terminal does
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert read_manifest(unbroken)["status"] == "interrupted"
    assert (unbroken / "report.html").is_file()

    with training(killed, *services) as process:
        wait_for(lambda: 3 in read_steps(killed), what="step 3", process=process)
        end_training(process, lambda: os.killpg(process.pid, signal.SIGKILL))

    with training(killed, *services) as process:
        wait_for(lambda: 5 in read_steps(killed), what="step 5", process=process)
        output = end_training(process, lambda: kill_raylet(psutil.Process(process.pid)))
    assert process.returncode == 1, output
    assert "global_step_2" in output  # what it resumes from
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: Ray's raylet ended"), output
    done = max(read_steps(killed))
    assert sorted(read_steps(killed)) == list(range(1, done + 1))
    manifest = read_manifest(killed)
    assert (manifest["status"], manifest["saved_step"]) == ("failed", done)
    assert (killed / "report.html").is_file()

    first, second = (
        load_file(run / "checkpoints/global_step_4/huggingface/model.safetensors")
        for run in (unbroken, killed)
    )
    assert first.keys() == second.keys()
    assert [name for name in first if (first[name] != second[name]).any()] == []

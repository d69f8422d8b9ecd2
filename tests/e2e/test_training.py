"""Whole runs with the real parts over real sockets: vLLM, Ray, Faiss, both services, gradients."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import Quickstart
from tests.e2e.running import ROOT, end_training, read_manifest, read_steps, training, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


def test_quickstart_trains_reports_and_needs_no_more_than_the_readme_says(quickstart: Quickstart) -> None:
    run_dir = quickstart.run_dir
    summary = json.loads(quickstart.finished.stdout.splitlines()[-1])
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
    if quickstart.obstacle:
        pytest.skip(f"passed with all that this machine has: {quickstart.obstacle}")


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


def fill_disk(trainer: psutil.Process) -> None:
    """Let the actors write no file of more than 100 kB, as if the disk took no more."""
    for child in trainer.children(recursive=True):
        if child.name().startswith("ray::ActorHost"):
            child.rlimit(psutil.RLIMIT_FSIZE, (100_000, psutil.RLIM_INFINITY))


def has_saved(run_dir: Path, step: int) -> bool:
    """Return whether a checkpoint, which is written beside the steps, is complete."""
    return (run_dir / "checkpoints" / f"global_step_{step}").is_dir()


def kill_raylet(trainer: psutil.Process) -> None:
    next(child for child in trainer.children(recursive=True) if child.name() == "raylet").kill()


def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(
    tmp_path: Path, retriever: str, gain_service: str
) -> None:
    """Three runs, each ended in another way: by a full disk, by SIGKILL, and by the death of Ray."""
    services = (f"retriever.url={retriever}", f"reward.semantic.url={gain_service}")
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"

    with training(unbroken, *services, "trainer.save_freq=4", "trainer.profile_steps=[2]") as process:
        wait_for(lambda: 5 in read_steps(unbroken) and has_saved(unbroken, 4), what="step 5", process=process)
        output = end_training(process, lambda: fill_disk(psutil.Process(process.pid)))
    assert process.returncode == 1, output
    last = output.splitlines()[-1]
    assert last.startswith("error: "), output
    assert ": File too large; raise the limit" in last
    done = max(read_steps(unbroken))
    assert_failed_with_report(unbroken, output, saved_step=4)
    assert f"steps 5 to {done} are lost" in output
    assert_speed_is_measured(unbroken, saved_step=4)

    with training(killed, *services) as process:
        wait_for(lambda: 3 in read_steps(killed) and has_saved(killed, 2), what="step 3", process=process)
        end_training(process, lambda: os.killpg(process.pid, signal.SIGKILL))

    with training(killed, *services) as process:
        wait_for(lambda: 5 in read_steps(killed), what="step 5", process=process)
        output = end_training(process, lambda: kill_raylet(psutil.Process(process.pid)))
    assert process.returncode == 1, output
    assert "global_step_2" in output  # what it resumes from
    assert output.splitlines()[-1].startswith("error: Ray's raylet ended"), output
    done = max(read_steps(killed))
    assert sorted(read_steps(killed)) == list(range(1, done + 1))
    assert_failed_with_report(killed, output, saved_step=done)

    first, second = (
        load_file(run / "checkpoints/global_step_4/huggingface/model.safetensors")
        for run in (unbroken, killed)
    )
    assert first.keys() == second.keys()
    assert [name for name in first if (first[name] != second[name]).any()] == []


def assert_speed_is_measured(run_dir: Path, *, saved_step: int) -> None:
    """Every phase has its tokens, FLOP and bytes; on a CPU no share of a peak. One step has a trace."""
    steps = read_steps(run_dir)
    expected = {"update_tokens_per_s", "update_flops_per_s", "prefilled_tokens_per_s", "publish_bytes"}
    for step in steps.values():
        assert all(step[f"perf/{name}"] > 0 for name in expected)
        assert not [name for name in step if name.endswith(("flops_share", "bandwidth_share"))]
    assert steps[saved_step + 1]["perf/checkpoint_bytes"] > steps[saved_step]["perf/publish_bytes"]
    assert [path.name for path in (run_dir / "profile").iterdir()] == ["step_2_rank_0.json.gz"]


def assert_failed_with_report(run_dir: Path, output: str, *, saved_step: int) -> None:
    """The run says in one line why it failed, and has recorded what is saved."""
    assert "Traceback" not in output
    manifest = read_manifest(run_dir)
    assert (manifest["status"], manifest["saved_step"]) == ("failed", saved_step)
    assert (run_dir / "report.html").is_file()

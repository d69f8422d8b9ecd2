"""What goes wrong is named within seconds, loses nothing and leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.e2e.running import (
    end_training,
    read_steps,
    start_gain_service,
    start_retriever,
    start_training,
    wait_for,
)
from tests.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.mark.parametrize("dying", ["retriever", "IG service"])
def test_a_service_that_dies_stops_the_run_with_its_name_and_keeps_the_checkpoint(
    tmp_path: Path, dying: str, retriever: str, gain_service: str
) -> None:
    is_retriever = dying == "retriever"
    service, url = (start_retriever if is_retriever else start_gain_service)(tmp_path)
    run_dir = tmp_path / "run"
    process = start_training(
        run_dir,
        f"retriever.url={url if is_retriever else retriever}",
        f"reward.semantic.url={gain_service if is_retriever else url}",
        "retriever.timeout_s=2",
        "reward.semantic.timeout_s=2",
    )
    try:
        wait_for(lambda: 2 in read_steps(run_dir), what="step 2", process=process)
        output = end_training(process, lambda: os.killpg(service.pid, signal.SIGKILL))
    finally:
        service.kill()
        service.wait()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, output
    assert ("search_failed" if is_retriever else "gain_failed") in output
    assert url in output
    assert "Traceback" not in output
    assert json.loads((run_dir / "run_manifest.json").read_text())["status"] == "failed"
    assert (run_dir / "checkpoints" / "global_step_2" / "manifest.json").is_file()
    assert (run_dir / "report.html").is_file()


def kill_raylet(trainer: psutil.Process) -> None:
    next(child for child in trainer.children(recursive=True) if child.name() == "raylet").kill()


def fill_disk(trainer: psutil.Process) -> None:
    """Let the actors write no file of more than 100 kB, as if the disk took no more."""
    for child in trainer.children(recursive=True):
        if child.name().startswith("ray::_Host"):
            child.rlimit(psutil.RLIMIT_FSIZE, (100_000, psutil.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("fault", "cause", "is_saved"),
    [
        (kill_raylet, "error: Ray's raylet ended", True),
        (fill_disk, ": File too large; raise the limit", False),
    ],
)
def test_a_run_that_cannot_go_on_says_why_last_and_what_became_of_its_steps(
    tmp_path: Path, fault: Callable[[psutil.Process], None], cause: str, is_saved: bool, retriever: str
) -> None:
    run_dir = tmp_path / "run"
    process = start_training(
        run_dir, f"retriever.url={retriever}", "algorithm=search_r1", "trainer.save_freq=100"
    )
    try:
        wait_for(lambda: 2 in read_steps(run_dir), what="step 2", process=process)
        output = end_training(process, lambda: fault(psutil.Process(process.pid)))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    last = output.splitlines()[-1]
    assert last.startswith("error: "), output
    assert cause in last
    assert process.returncode == 1
    assert "Traceback" not in output
    manifest = json.loads((run_dir / "run_manifest.json").read_text())
    assert manifest["status"] == "failed"
    done = max(read_steps(run_dir))
    assert manifest["saved_step"] == (done if is_saved else None)
    assert (f"steps 1 to {done} are lost" in output) != is_saved
    assert (run_dir / "report.html").is_file()


def assert_refused(run_dir: Path, *overrides: str, told: list[str]) -> None:
    """Exit code 1 with one message, within seconds of the imports."""
    began = time.monotonic()
    process = start_training(run_dir, *overrides)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert [text for text in told if text not in output] == [], output
    assert "Traceback" not in output
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("dead", ["retriever", "IG service"])
def test_dead_service_at_start_is_named_within_seconds(
    tmp_path: Path, dead: str, retriever: str, gain_service: str
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    is_retriever = dead == "retriever"
    assert_refused(
        tmp_path / "run",
        f"retriever.url={nowhere if is_retriever else retriever}",
        f"reward.semantic.url={gain_service if is_retriever else nowhere}",
        "trainer.service_wait_s=2",
        told=[nowhere, "retrieval_launch.sh" if is_retriever else "IG_service_launch.sh"],
    )


@pytest.mark.parametrize("wrong", ["parquet", "model", "folder"])
def test_wrong_input_is_named_within_seconds(
    tmp_path: Path, wrong: str, retriever: str, gain_service: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    parquet = tmp_path / "broken.parquet"
    parquet.write_bytes(b"PAR1 this is no parquet file PAR1")
    overrides, told = {
        "parquet": ([f"data.train_files={parquet}"], [str(parquet)]),
        "model": (
            [f"actor_rollout_ref.model.path={tmp_path}/nowhere"],
            ["actor_rollout_ref.model.path", f"{tmp_path}/nowhere"],
        ),
        "folder": ([], [str(run_dir), "in use by another run"]),
    }[wrong]
    with (run_dir / ".lock").open("w") as lock:
        if wrong == "folder":
            fcntl.flock(lock, fcntl.LOCK_EX)
        services = (f"retriever.url={retriever}", f"reward.semantic.url={gain_service}")
        assert_refused(run_dir, *services, *overrides, told=told)

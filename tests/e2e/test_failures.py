"""Failures are named at once; they lose nothing and leave no process behind."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import RETRIEVER
from tests.e2e.running import end_training, read_manifest, read_steps, running_service, training, wait_for
from tests.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_a_service_that_dies_stops_the_run_with_its_name_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with (
        running_service(*RETRIEVER, folder=tmp_path) as (service, url),
        training(run_dir, f"retriever.url={url}", "algorithm=search_r1", "retriever.timeout_s=2") as process,
    ):
        wait_for(lambda: 2 in read_steps(run_dir), what="step 2", process=process)
        output = end_training(process, service.kill)
    assert process.returncode == 1, output
    assert "search_failed" in output
    assert url in output
    assert "Traceback" not in output
    assert read_manifest(run_dir)["status"] == "failed"
    assert (run_dir / "checkpoints" / "global_step_2" / "manifest.json").is_file()
    assert (run_dir / "report.html").is_file()


def fill_disk(trainer: psutil.Process) -> None:
    """Let the actors write no file of more than 100 kB, as if the disk took no more."""
    for child in trainer.children(recursive=True):
        if child.name().startswith("ray::_Host"):
            child.rlimit(psutil.RLIMIT_FSIZE, (100_000, psutil.RLIM_INFINITY))


def test_a_run_that_cannot_be_saved_names_the_steps_that_are_lost(tmp_path: Path, retriever: str) -> None:
    run_dir = tmp_path / "run"
    overrides = (f"retriever.url={retriever}", "algorithm=search_r1", "trainer.save_freq=100")
    with training(run_dir, *overrides) as process:
        wait_for(lambda: 2 in read_steps(run_dir), what="step 2", process=process)
        output = end_training(process, lambda: fill_disk(psutil.Process(process.pid)))
    last = output.splitlines()[-1]
    assert last.startswith("error: "), output
    assert ": File too large; raise the limit" in last
    assert process.returncode == 1
    assert "Traceback" not in output
    manifest = read_manifest(run_dir)
    assert (manifest["status"], manifest["saved_step"]) == ("failed", None)
    assert f"steps 1 to {max(read_steps(run_dir))} are lost" in output
    assert (run_dir / "report.html").is_file()


def test_what_cannot_start_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for overrides, naming in (
        (["actor_rollout_ref.model.path=nowhere"], ["actor_rollout_ref.model.path", "nowhere"]),
        (
            ["algorithm=search_r1", f"retriever.url={nowhere}", "trainer.service_wait_s=1"],
            [nowhere, "retrieval_launch.sh"],
        ),
    ):
        with training(tmp_path / "run", *overrides) as process:
            output, _ = process.communicate()
        assert process.returncode == 1, output
        assert [text for text in naming if text not in output] == [], output
        assert "Traceback" not in output


def test_a_run_that_waits_for_a_service_can_be_stopped(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with training(tmp_path / "run", f"retriever.url={url}", "algorithm=search_r1") as process:
            silent.accept()
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Traceback" not in output

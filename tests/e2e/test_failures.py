"""Failures are named at once; they lose nothing and leave no process behind."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from tests.e2e.conftest import RETRIEVER
from tests.e2e.running import end_training, read_manifest, read_steps, running_service, training, wait_for
from tests.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


def test_siop_trains_and_a_service_that_dies_stops_the_run_with_its_name(
    tmp_path: Path, gain_service: str
) -> None:
    """A method with the entailment of the IG service and the policy's log-probs, sampled one step ahead."""
    run_dir = tmp_path / "run"
    settings = (
        f"reward.semantic.url={gain_service}",
        "trainer.save_freq=1",
        "retriever.timeout_s=2",
        "trainer.schedule=one_step_off",
    )
    with (
        running_service(*RETRIEVER, folder=tmp_path) as (service, url),
        training(run_dir, "siop", f"retriever.url={url}", *settings) as process,
    ):
        wait_for(lambda: 2 in read_steps(run_dir), what="step 2", process=process)
        output = end_training(process, service.kill)
    assert process.returncode == 1, output
    assert "search_failed" in output
    assert url in output
    assert "Traceback" not in output
    manifest = read_manifest(run_dir)
    assert manifest["status"] == "failed"
    assert "ig_service" in manifest["services"]  # type: ignore[operator]
    steps = read_steps(run_dir)
    assert sorted(steps) == [*range(1, max(steps) + 1)]
    assert manifest["saved_step"] == max(steps)  # what had trained when the next episodes failed is not lost
    assert (run_dir / "checkpoints" / f"global_step_{max(steps)}" / "manifest.json").is_file()
    assert (run_dir / "report.html").is_file()

    for number, staleness in ((1, 0.0), (2, 1.0)):
        step = steps[number]
        assert step["policy/staleness_mean"] == step["policy/staleness_max"] == staleness
        assert step["reward/failed_share"] == 0
        assert step["policy/grad_norm"] > 0
        assert step["policy/publish_difference"] < 1e-3
    lines = (run_dir / "trajectories" / "step_000001.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert bool(record["turn_gains"]) == (record["stop"] == "answered")


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

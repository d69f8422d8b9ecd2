"""Whole runs with the real parts over real sockets: vLLM, Ray, Faiss, both services, gradients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 420.0
SMALL_RUN = (
    "trainer.device=cpu",
    "trainer.logger=[console]",
    "trainer.save_freq=2",
    "trainer.val_before_train=false",
    "trainer.val_after_train=false",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n_agent=3",
    "actor_rollout_ref.actor.ppo_mini_batch_size=12",
    "actor_rollout_ref.actor.optim.lr=3e-4",
)
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def wait_for(condition: Callable[[], object], *, what: str, process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before {what}"
        assert time.monotonic() < give_up, f"no {what} after {DEADLINE_S:.0f} s"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_service(*command: str, log: Path) -> tuple[subprocess.Popen[str], str]:
    port = free_port()
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port)],
            cwd=ROOT,
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(f"{url}/readyz"), what=f"{command[0]} being ready", process=process)
    return process, url


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("retriever") / "log"
    process, url = start_service("search_r1.search.retrieval_server", log=log)
    yield url
    stop(process)


def start_gain_service(folder: Path) -> tuple[subprocess.Popen[str], str]:
    arguments = ("IG.service.IG_server", "--num-generations", "4", "--max-new-tokens", "8")
    return start_service(*arguments, log=folder / "ig.log")


@pytest.fixture(scope="module")
def gain_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = start_gain_service(tmp_path_factory.mktemp("gain_service"))
    yield url
    stop(process)


def start_training(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "verl.trainer.main_ppo",
            *SMALL_RUN,
            f"trainer.default_local_dir={run_dir}",
            *overrides,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(run_dir: Path, *overrides: str) -> str:
    process = start_training(run_dir, *overrides)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    return output


def read_steps(run_dir: Path) -> dict[int, dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row for row in rows if row["kind"] == "train"}


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


def test_killed_run_resumes_to_the_weights_of_an_unbroken_one(
    tmp_path: Path, retriever: str, gain_service: str
) -> None:
    services = (f"retriever.url={retriever}", f"reward.semantic.url={gain_service}")
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    train(unbroken, *services, "trainer.total_training_steps=4")

    process = start_training(killed, *services, "trainer.total_training_steps=4")
    wait_for(lambda: 3 in read_steps(killed), what="step 3", process=process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output = train(killed, *services, "trainer.total_training_steps=4")

    assert "global_step_2" in output  # said where it goes on from
    assert sorted(read_steps(killed)) == [1, 2, 3, 4]
    first, second = (
        load_file(run / "checkpoints/global_step_4/huggingface/model.safetensors")
        for run in (unbroken, killed)
    )
    assert first.keys() == second.keys()
    assert [name for name in first if (first[name] != second[name]).any()] == []


def test_a_gain_service_that_dies_stops_the_run_with_its_name_and_keeps_the_checkpoint(
    tmp_path: Path, retriever: str
) -> None:
    service, url = start_gain_service(tmp_path)
    run_dir = tmp_path / "run"
    process = start_training(
        run_dir,
        f"retriever.url={retriever}",
        f"reward.semantic.url={url}",
        "reward.semantic.timeout_s=2",
        "trainer.total_training_steps=200",
    )
    try:
        wait_for(lambda: 2 in read_steps(run_dir), what="step 2", process=process)
        os.killpg(service.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        service.wait()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert "gain_failed" in output
    assert url in output
    manifest = json.loads((run_dir / "run_manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert (run_dir / "checkpoints" / "global_step_2" / "manifest.json").is_file()
    assert (run_dir / "report.html").is_file()


@pytest.mark.parametrize("dead", ["retriever", "IG service"])
def test_dead_service_at_start_is_named_within_seconds(tmp_path: Path, dead: str, retriever: str) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    search_url = nowhere if dead == "retriever" else retriever
    process = start_training(
        tmp_path / "run",
        f"retriever.url={search_url}",
        f"reward.semantic.url={nowhere}",
        "trainer.service_wait_s=2",
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    script = "retrieval_launch.sh" if dead == "retriever" else "IG_service_launch.sh"
    assert script in output or dead in output
    assert nowhere in output
    assert "Traceback" not in output

"""Start the real programs on free ports, wait for them, end them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 280.0
SMALL_RUN = (
    "trainer.device=cpu",
    "trainer.logger=[console]",
    "trainer.total_training_steps=400",
    "trainer.save_freq=2",
    "trainer.test_freq=0",
    "trainer.max_checkpoints_to_keep=9",
    "trainer.val_before_train=false",
    "trainer.val_after_train=false",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n_agent=3",
    "actor_rollout_ref.actor.ppo_mini_batch_size=12",
    "actor_rollout_ref.actor.optim.lr=3e-4",
)
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_for(condition: Callable[[], object], *, what: str, process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before {what}"
        assert time.monotonic() < give_up, f"no {what} after {DEADLINE_S:.0f} s"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        with _DIRECTLY.open(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def start_service(*command: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """The process and its address, once it is ready; its log goes to the folder."""
    port = free_port()
    with (folder / f"{command[0]}.log").open("w") as sink:
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


def start_retriever(folder: Path) -> tuple[subprocess.Popen[str], str]:
    return start_service("search_r1.search.retrieval_server", folder=folder)


def start_gain_service(folder: Path) -> tuple[subprocess.Popen[str], str]:
    arguments = ("--num-generations", "4", "--max-new-tokens", "8")
    return start_service("IG.service.IG_server", *arguments, folder=folder)


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
    process.wait(timeout=60)


def start_training(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    """As users do, through the launcher, which becomes the trainer: a signal to it reaches the trainer."""
    return subprocess.Popen(
        ["bash", str(ROOT / "train_grpo.sh"), *SMALL_RUN, f"trainer.default_local_dir={run_dir}", *overrides],
        cwd=run_dir.parent,
        env={**os.environ, "RECIPE": "world", "VIRTUAL_ENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_training(process: subprocess.Popen[str], end: Callable[[], None], *, within_s: float = 60.0) -> str:
    """Call `end`; the trainer and all that it started must be gone in time. Returns what it printed."""
    family = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    end()
    output, _ = process.communicate(timeout=within_s)
    _, alive = psutil.wait_procs(family, timeout=max(0.0, within_s - (time.monotonic() - began)))
    assert not alive, output
    return output


def read_steps(run_dir: Path) -> dict[int, dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row for row in rows if row["kind"] == "train"}

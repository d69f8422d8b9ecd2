"""Start the real programs on free ports, wait for them, end them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
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
    "actor_rollout_ref.actor.use_kl_loss=false",  # no frozen reference to load
)
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_for(condition: Callable[[], object], *, what: str, process: subprocess.Popen[str]) -> None:
    """Wait while the process lives; a hang is ended by the limit that every test has."""
    while not condition():
        if process.poll() is not None:
            with suppress(ProcessLookupError):  # what it started may hold the pipe
                os.killpg(process.pid, signal.SIGKILL)
            said = process.stdout.read() if process.stdout is not None else ""
            raise AssertionError(f"ended with {process.returncode} before {what}\n{said}")
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        with _DIRECTLY.open(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def running_service(*command: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield the process of a service and its address, once it is ready; its log goes to the folder."""
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
    try:
        wait_for(lambda: answers(f"{url}/readyz"), what=f"{command[0]} being ready", process=process)
        yield process, url
    finally:
        process.terminate()
        process.wait()


@contextmanager
def training(
    run_dir: Path, *overrides: str, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Train as users do, through the launcher, which becomes the trainer and gets its signals."""
    arguments = (*SMALL_RUN, f"trainer.default_local_dir={run_dir}", *overrides)
    with launched("train_grpo.sh", *arguments, cwd=run_dir.parent, variables=variables) as process:
        yield process


@contextmanager
def launched(
    script: str, *arguments: str, cwd: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start a launcher on the embedded world; what is left of it at the end is killed."""
    process = subprocess.Popen(
        ["bash", str(ROOT / script), *arguments],
        cwd=cwd,
        env={**os.environ, "RECIPE": "world", "VIRTUAL_ENV": sys.prefix, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def end_training(process: subprocess.Popen[str], end: Callable[[], object]) -> str:
    """Call `end` and wait for the trainer and all that it started to be gone. Return what it printed."""
    family = psutil.Process(process.pid).children(recursive=True)
    end()
    output, _ = process.communicate()
    psutil.wait_procs(family)
    return output


def read_steps(run_dir: Path) -> dict[int, dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row for row in rows if row["kind"] == "train"}


def read_manifest(run_dir: Path) -> dict[str, object]:
    manifest = json.loads((run_dir / "run_manifest.json").read_text())
    assert isinstance(manifest, dict)
    return manifest

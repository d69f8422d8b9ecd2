from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from verl.errors import DataError
from verl.run.tracking import Tracker, console_line, read_metrics
from verl.run.wandb_mirror import wandb_mode
from verl.trainer.config.schema import TrainerConfig

QUIET, CONSOLE = TrainerConfig(logger=[]), TrainerConfig(logger=["console"])
STEP = {
    "reward/mean": 0.5,
    "ig/gain_mean": -0.25,
    "policy/kl": 0.001,
    "rollout/searches_mean": 1.5,
    "time/rollout_s": 2.0,
    "time/update_s": 1.0,
}


def _steps(run_dir: Path) -> list[tuple[object, object]]:
    return [(line["step"], line["kind"]) for line in read_metrics(run_dir)]


def test_a_second_tracker_continues_the_file(tmp_path: Path) -> None:
    for steps in ((1, 2), (3, 4)):
        tracker = Tracker(tmp_path, QUIET)
        for step in steps:
            tracker.log(step, {"reward/mean": 0.0})
        tracker.finish()
    assert _steps(tmp_path) == [(step, "train") for step in range(1, 5)]


def test_a_line_cut_by_a_crash_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, QUIET)
    tracker.log(1, {"reward/mean": 0.0})
    assert _steps(tmp_path) == [(1, "train")]  # on disk at once
    tracker.finish()
    with tracker.path.open("a") as file:
        file.write('{"step": 2, "ki')
    assert _steps(tmp_path) == [(1, "train")]
    assert "cut" in caplog.text
    Tracker(tmp_path, QUIET).finish()
    assert tracker.path.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"not json", "Invalid JSON"),
        (b'{"step": "one", "kind": "train"}', "step: Input should be a valid integer"),
        (b'{"step": 1}', "kind: Field required"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, named: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "kind": "train"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"metrics\.jsonl:2: .*({named})"):
        read_metrics(tmp_path)


class _Gone(StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_lost_console_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, CONSOLE, console=Console(file=_Gone()))
    for step in (1, 2):
        tracker.log(step, STEP)
    tracker.finish()
    assert len(read_metrics(tmp_path)) == 2
    assert caplog.text.count("the console cannot be written any more") == 1


def test_non_finite_numbers_are_null_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, CONSOLE, console=Console(file=StringIO()))
    with caplog.at_level(logging.WARNING):
        tracker.log(7, {"reward/mean": float("nan"), "policy/kl": float("inf")})
    tracker.finish()
    line = json.loads(tracker.path.read_text())
    assert line["reward/mean"] is None
    assert line["policy/kl"] is None
    assert "step 7: reward/mean is nan" in caplog.text


def test_console_line_is_one_line_with_the_phases(tmp_path: Path) -> None:
    screen = StringIO()
    tracker = Tracker(
        tmp_path, CONSOLE, total_steps=50, console=Console(file=screen, width=40, soft_wrap=True)
    )
    tracker.log(3, STEP)
    tracker.finish()
    assert screen.getvalue().count("\n") == 1
    for part in (
        "step    3/50",
        "reward 0.500",
        "gain -0.250",
        "searches 1.50",
        "3.0 s",
        "rollout 2.0",
        "update 1.0",
    ):
        assert part in screen.getvalue()
    line = console_line(0, {"val/em": 0.25, "val/em/nq": 0.5}, kind="val", total_steps=None)
    assert line.plain == "step    0 held-out  em 0.250"


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_MODE": "online"}, "offline"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "disabled"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
    ],
)
def test_never_online_without_a_key(environ: dict[str, str], mode: str, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert wandb_mode({**home, **environ}) == mode
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    assert wandb_mode(home) == "online"  # a stored login is a key


_OFFLINE_RUN = """
import sys
from pathlib import Path
from verl.run.tracking import Tracker
from verl.trainer.config.schema import TrainerConfig
tracker = Tracker(Path(sys.argv[1]), TrainerConfig(), run_config={"api_key": "planted-secret", "lr": 0.1})
tracker.log(1, {"reward/mean": 0.5})
tracker.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("has_key", [False, True])
def test_wandb_without_key_or_server_runs_offline_inside_the_run_folder(
    tmp_path: Path, has_key: bool
) -> None:
    run_dir = tmp_path / "run"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        if has_key:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            environ |= {"WANDB_API_KEY": "planted-secret-" + 40 * "0", "WANDB_BASE_URL": url, "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", _OFFLINE_RUN, str(run_dir)],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "W&B failed" not in done.stderr, done.stderr
    assert ("; going offline" in done.stderr) is has_key
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert read_metrics(run_dir)[0]["reward/mean"] == 0.5
    for path in run_dir.rglob("*"):
        assert not path.is_file() or b"planted-secret" not in path.read_bytes(), path


def test_a_broken_wandb_is_reported_once_and_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    tracker = Tracker(tmp_path, TrainerConfig(logger=["wandb"]))
    tracker.log(1, STEP)
    tracker.log(2, STEP)
    tracker.finish()
    assert len(read_metrics(tmp_path)) == 2
    assert caplog.text.count("the run continues without it") == 1

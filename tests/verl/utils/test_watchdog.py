"""Descendants end with their guardian's parent, and only then."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from verl.utils.watchdog import Watchdog
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
nest = [sys.executable, "-c", f"import subprocess; subprocess.run({sleep!r})"]
earlier = subprocess.Popen(sleep, start_new_session=True)
watchdog = Watchdog()
guarded = subprocess.Popen(nest, start_new_session=True)
if sys.argv[1] != "early":
    time.sleep(1.0)
    watchdog.guard()
if sys.argv[1] == "dismissed":
    watchdog.dismiss()
else:
    time.sleep(0.5)
print(earlier.pid, guarded.pid, flush=True)
time.sleep(600)
"""


def run_and_kill(how: str) -> tuple[psutil.Process, list[psutil.Process]]:
    """The child from before the watchdog, and those it was to guard, half a second after a kill -9."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert parent.stdout is not None
    earlier, guarded = (psutil.Process(int(word)) for word in parent.stdout.readline().split())
    family = [guarded, *guarded.children()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()  # its children still hold the pipe
    parent.stdout.close()
    return earlier, family


@pytest.mark.parametrize("how", ["guarded", "early"])
def test_guarded_descendants_die_with_a_killed_parent(how: str) -> None:
    earlier, family = run_and_kill(how)
    try:
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
        assert earlier.is_running()
    finally:
        earlier.kill()


def test_a_dismissed_watchdog_lets_them_live() -> None:
    earlier, family = run_and_kill("dismissed")
    time.sleep(0.5)
    try:
        assert all(process.is_running() for process in family)
    finally:
        for process in (*family, earlier):
            process.kill()

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from IG.lifeline import Lifeline

PROGRAM = """
import subprocess, sys, time
from IG.lifeline import Lifeline
lifeline = Lifeline()
tied = subprocess.Popen(["sleep", "600"])
lifeline.tie(tied.pid)
print(tied.pid, flush=True)
time.sleep(600)
"""


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_process_takes_what_is_tied_with_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    tied = int(parent.stdout.readline())
    assert not is_gone(tied)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while not is_gone(tied) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(tied)


def test_release_kills_nothing() -> None:
    lifeline = Lifeline()
    with subprocess.Popen(["sleep", "600"]) as tied:
        lifeline.tie(tied.pid)
        lifeline.release()
        assert tied.poll() is None
        tied.kill()

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from serving.lifeline import Lifeline, start_time

PROGRAM = """
import subprocess, sys, time
from serving.lifeline import Lifeline
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


def test_a_cut_kills_the_tied_process_and_none_that_got_its_id_later() -> None:
    lifeline = Lifeline()
    with subprocess.Popen(["sleep", "600"]) as tied, subprocess.Popen(["sleep", "600"]) as other:
        lifeline.tie(tied.pid)
        started = start_time(other.pid)
        assert started is not None
        lifeline._write(f"{other.pid}:{int(started) - 1}")  # what the id belonged to before
        lifeline._write("4194305:1")  # beyond every process id
        lifeline.cut()
        assert tied.wait(timeout=5) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


def test_a_name_with_brackets_does_not_hide_the_start_time(tmp_path: Path) -> None:
    program = tmp_path / "a) R (b"
    program.symlink_to("/bin/sleep")
    lifeline = Lifeline()
    with subprocess.Popen([program, "600"]) as tied:
        lifeline.tie(tied.pid)
        lifeline.cut()
        assert tied.wait(timeout=5) == -signal.SIGKILL


def test_a_process_that_is_gone_is_not_tied() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    lifeline = Lifeline()
    lifeline.tie(gone.pid)
    lifeline.cut()
    assert start_time(gone.pid) is None


def test_a_cut_spares_what_ended_by_itself_and_does_nothing_twice() -> None:
    lifeline = Lifeline()
    with subprocess.Popen(["sleep", "0.01"]) as tied:
        lifeline.tie(tied.pid)
        assert tied.wait() == 0
        lifeline.cut()
        lifeline.cut()


def test_a_folder_goes_with_the_processes(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").touch()
    lifeline = Lifeline()
    lifeline.leave_nothing_in(folder)
    lifeline.cut()
    assert not folder.exists()
    assert tmp_path.exists()


@pytest.mark.parametrize("path", ["relative/folder", "/with space/folder", ""])
def test_a_folder_that_could_be_taken_for_another_is_refused(path: str) -> None:
    lifeline = Lifeline()
    with pytest.raises(ValueError, match="expected an absolute path without white space"):
        lifeline.leave_nothing_in(Path(path))
    lifeline.cut()

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serving.processes import ProcessGuard, start_time

_HANG_S = 60
"""Far above what anything here takes, also on a slow machine."""

# A child from before the guard, one that is added, and a nested one that appears while the block runs.
_OWNER = """
import subprocess, sys, time
from pathlib import Path
from serving.processes import ProcessGuard, list_children_with
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
nest = [sys.executable, "-c", f"import subprocess; subprocess.run({sleep!r})", "nested"]
earlier = subprocess.Popen(sleep)
guard = ProcessGuard()
guard.add_folder(Path(sys.argv[1]))
added = subprocess.Popen(sleep, start_new_session=True)
guard.add(added.pid)
with guard.adding(lambda: list_children_with("nested")):
    nested = subprocess.Popen(nest, start_new_session=True)
    while len(guard._added) < 3:
        time.sleep(0.01)
    print(earlier.pid, added.pid, nested.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_owner_takes_processes_and_folder_along(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    command = [sys.executable, "-c", _OWNER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as owner:
        assert owner.stdout is not None
        earlier, added, nested = (psutil.Process(int(word)) for word in owner.stdout.readline().split())
        (shell,) = (child for child in psutil.Process(owner.pid).children() if child.name() == "sh")
        family = [shell, added, nested, *nested.children()]
        owner.kill()
    try:
        _, alive = psutil.wait_procs(family, timeout=_HANG_S)
        assert alive == []
        assert len(family) == 4
        assert earlier.is_running()
        assert not folder.exists()
    finally:
        earlier.kill()


_PARENT = """
import multiprocessing, os, time
from serving.processes import end_with_parent
def work():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)
multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(600)
"""


def test_a_process_ends_with_its_killed_parent() -> None:
    command = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=_HANG_S)
    assert alive == []


def test_closing_kills_what_was_added_and_none_that_got_its_id_later() -> None:
    guard = ProcessGuard()
    with subprocess.Popen(["sleep", "600"]) as added, subprocess.Popen(["sleep", "600"]) as other:
        guard.add(added.pid)
        started = start_time(other.pid)
        assert started is not None
        guard._write(f"{other.pid}:{int(started) - 1}")  # the process that had this id before
        guard._write("4194305:1")  # beyond every process id
        guard.close()
        assert added.wait(timeout=_HANG_S) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


def test_a_name_with_brackets_does_not_hide_the_start_time(tmp_path: Path) -> None:
    program = tmp_path / "a) R (b"
    program.symlink_to("/bin/sleep")
    guard = ProcessGuard()
    with subprocess.Popen([program, "600"]) as added:
        guard.add(added.pid)
        guard.close()
        assert added.wait(timeout=_HANG_S) == -signal.SIGKILL


def test_with_a_grace_period_processes_may_end_in_order() -> None:
    obedient = [sys.executable, "-c", "import time; time.sleep(600)"]
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
    stubborn = [sys.executable, "-c", f"{ignore}; time.sleep(600)"]
    guard = ProcessGuard(grace_s=1.0)
    with subprocess.Popen(obedient) as first, subprocess.Popen(stubborn, stdout=subprocess.PIPE) as second:
        assert second.stdout is not None
        second.stdout.readline()
        for process in (first, second):
            guard.add(process.pid)
        guard.close()
        assert first.wait(timeout=_HANG_S) == -signal.SIGTERM
        assert second.wait(timeout=_HANG_S) == -signal.SIGKILL


def test_a_process_that_is_gone_is_not_added_and_closing_twice_does_nothing() -> None:
    guard = ProcessGuard()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert start_time(gone.pid) is None
    guard.add(gone.pid)
    guard.close()
    guard.close()


def test_without_its_shell_a_guard_warns(caplog: pytest.LogCaptureFixture) -> None:
    guard = ProcessGuard()
    guard._shell.kill()
    guard._shell.wait()
    guard.add(os.getpid())
    guard.close()
    assert "may outlive this process" in caplog.text


@pytest.mark.parametrize("path", ["relative/folder", "/with space/folder", ""])
def test_a_folder_that_could_be_taken_for_another_is_refused(path: str) -> None:
    guard = ProcessGuard()
    with pytest.raises(ValueError, match="expected an absolute path without white space"):
        guard.add_folder(Path(path))
    guard.close()

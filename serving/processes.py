"""End processes together with this one, even if it is killed with SIGKILL.

A small shell in a session of its own reads process ids and folders from a pipe. The pipe closes when this
process ends, however it ends; then the shell ends the processes and removes the folders.

Process ids are reused, so a process is recorded with its start time and gets a signal only while the process
of this id still has the same one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

# In /proc/PID/stat, what follows the name in brackets begins with field 3; the start time is field 22.
_GUARD = """
set -f
owned=""
while read -r word; do
  [ "$word" = end ] && break
  owned="$owned $word"
done
signal_all() {  # succeeds if a process got the signal
  found=1
  for word in $owned; do
    case $word in /*) continue ;; esac
    pid=${word%:*}
    { read -r stat < "/proc/$pid/stat"; } 2>/dev/null || continue
    set -- "$1" ${stat##*) }
    [ "$2" != Z ] && [ "${21}" = "${word#*:}" ] && kill "-$1" "$pid" 2>/dev/null && found=0
  done
  return $found
}
left=$1
[ "$left" -gt 0 ] && signal_all TERM
while [ "$left" -gt 0 ] && signal_all 0; do
  sleep 0.1
  left=$((left - 1))
done
signal_all KILL
for word in $owned; do
  case $word in /*) ;; *) continue ;; esac
  for pause in 0.1 0.5 2; do  # the killed processes may still write there
    sleep $pause
    rm -rf "$word" 2>/dev/null && break
  done
done
exit 0
"""
_LOOK_EVERY_S = 0.2
_END_TIMEOUT_S = 10.0


class ProcessGuard:
    """Ends the added processes when this process ends, or at `close`."""

    def __init__(self, *, grace_s: float = 0.0) -> None:
        """Take `grace_s`, the time between SIGTERM and SIGKILL; 0 sends SIGKILL at once."""
        self._grace_s = grace_s
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(round(grace_s * 10))],
            stdin=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C ends the owner, not the guard
        )
        self._added: set[str] = set()

    def add(self, pid: int) -> None:
        """Add a process; one that has already ended is left out."""
        started = start_time(pid)
        word = f"{pid}:{started}"
        if started is not None and word not in self._added:
            self._added.add(word)
            self._write(word)

    def add_folder(self, folder: Path) -> None:
        """Add a folder, which is removed after the processes have ended.

        Raises ValueError unless its path is absolute and without white space.
        """
        path = str(folder)
        if not path.startswith("/") or path.split() != [path]:
            raise ValueError(f"the folder is {path!r}, expected an absolute path without white space")
        self._write(path)

    @contextmanager
    def adding(self, find: Callable[[], list[psutil.Process]]) -> Iterator[None]:
        """Add the processes that `find` returns, and their descendants, repeatedly while the block runs.

        For libraries that start processes of their own while they load.
        """
        done = threading.Event()

        def look() -> None:
            while not done.wait(_LOOK_EVERY_S):
                self.add_families(find())

        thread = threading.Thread(target=look, name="process-guard", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.add_families(find())

    def add_families(self, processes: list[psutil.Process]) -> None:
        """Add these processes and their descendants."""
        for process in processes:
            with suppress(psutil.Error):
                for member in (process, *process.children(recursive=True)):
                    self.add(member.pid)

    def close(self) -> None:
        """End what was added now; a second call does nothing."""
        if self._shell.poll() is None:
            self._write("end")
            self._shell.wait(timeout=self._grace_s + _END_TIMEOUT_S)

    def _write(self, word: str) -> None:
        assert self._shell.stdin is not None
        try:
            self._shell.stdin.write(word + "\n")
            self._shell.stdin.flush()
        except BrokenPipeError:
            logger.warning("the process guard %d is gone: %s may outlive this process", self._shell.pid, word)


def end_with_parent() -> None:
    """End this process, which `multiprocessing` started, when its parent is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, name="end-with-parent", daemon=True).start()


def start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]


def list_multiprocessing_children() -> list[psutil.Process]:
    """Return the children that `multiprocessing` started, not its helpers such as the resource tracker."""
    found = []
    for child in multiprocessing.active_children():
        with suppress(psutil.Error):
            found.append(psutil.Process(child.pid))
    return found


def list_children_with(argument: str) -> list[psutil.Process]:
    """Return the children of this process whose command line contains this text."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(argument in word for word in child.cmdline()):
                found.append(child)
    return found


def count_processor_seconds() -> float:
    """Return the processor seconds of this process and all its descendants that are alive."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total

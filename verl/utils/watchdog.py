"""End the child processes of a library when this process is gone, even by kill -9.

For a library that starts processes out of reach, as vLLM does. A watchdog process looks every quarter of a
second and notes the descendants that have appeared; the end of its pipe tells it that this process is gone,
whatever happened. One that appears and loses its parent between two looks is missed.

    watchdog = Watchdog()
    engine = start_something_with_children()
    watchdog.guard()
    ...
    watchdog.dismiss()
"""

from __future__ import annotations

import os
import select
import subprocess
import sys

import psutil

_SCAN_INTERVAL_S = 0.25


class Watchdog:
    """From its construction to `guard`, every new descendant of this process is taken under guard."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # -P: the modules next to this file must not take the place of the standard library's.
            [sys.executable, "-P", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has seen who was there before

    def guard(self) -> None:
        """Take no more under guard; kill those it has as soon as this process is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"guard\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def dismiss(self) -> None:
        """Let the descendants live. A second time does nothing."""
        self._process.kill()
        self._process.communicate()


def _watch(parent: psutil.Process) -> None:
    before = set(parent.children(recursive=True))
    guarded: set[psutil.Process] = set()
    print(flush=True)  # noqa: T201 - the pipe to the parent
    looking = True
    while looking:
        looking = not select.select([sys.stdin], [], [], _SCAN_INTERVAL_S)[0]
        try:
            guarded |= set(parent.children(recursive=True)) - before
        except psutil.NoSuchProcess:
            break
    if sys.stdin.readline():
        print(flush=True)  # noqa: T201
        sys.stdin.read()
    for process in guarded:
        try:
            process.kill()  # psutil makes sure that the pid is still the same process
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    _watch(psutil.Process(int(sys.argv[1])))

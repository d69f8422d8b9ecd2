"""Processes that must not outlive this one, even if it is killed with SIGKILL.

A tiny shell, in a session of its own, reads process ids from a pipe. When the pipe closes because this
process is gone, however it went, the shell kills what it was told. `release` is the ordinary end: no kill.
"""

from __future__ import annotations

import subprocess

_GUARD = """
pids=""
while read -r word; do
  [ "$word" = release ] && exit 0
  pids="$pids $word"
done
[ -n "$pids" ] && kill -KILL $pids 2>/dev/null
exit 0
"""


class Lifeline:
    """Ties other processes to the life of this one."""

    def __init__(self) -> None:
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD], stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        self._tied: set[int] = set()

    def tie(self, pid: int) -> None:
        """Let the process of that id die with this one."""
        if pid not in self._tied:
            self._tied.add(pid)
            self._write(str(pid))

    def release(self) -> None:
        """Let everything live on and end the guard; call it after the tied processes were stopped."""
        if self._guard.poll() is None:
            self._write("release")
            self._guard.wait(timeout=5)

    def _write(self, word: str) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(word + "\n")
        self._guard.stdin.flush()

"""Processes that must not outlive this one, even if it is killed with SIGKILL.

A tiny shell, in a session of its own, reads process ids from a pipe. When the pipe closes because this
process is gone, however it went, the shell kills what it was told and removes the folders it was told.

A process is told with its start time, and killed only if the process of that id still has it: ids are used
again, and whatever got one later is none of our business.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

# What follows the name in /proc/PID/stat begins with field 3; the start time is field 22.
_GUARD = """
set -f
told=""
while read -r word; do
  [ "$word" = cut ] && break
  told="$told $word"
done
for word in $told; do
  case $word in /*) continue ;; esac
  pid=${word%:*}
  { read -r stat < "/proc/$pid/stat"; } 2>/dev/null || continue
  set -- ${stat##*) }
  [ "${20}" = "${word#*:}" ] && kill -KILL "$pid" 2>/dev/null
done
for word in $told; do
  case $word in /*) ;; *) continue ;; esac
  for pause in 0.1 0.5 2; do  # who was killed may still write there
    sleep $pause
    rm -rf "$word" 2>/dev/null && break
  done
done
exit 0
"""


class Lifeline:
    """Ties other processes to the life of this one."""

    def __init__(self) -> None:
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD], stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        self._tied: set[str] = set()

    def tie(self, pid: int) -> None:
        """Let the process of that id die with this one; one that is gone already is left out."""
        started = start_time(pid)
        word = f"{pid}:{started}"
        if started is not None and word not in self._tied:
            self._tied.add(word)
            self._write(word)

    def leave_nothing_in(self, folder: Path) -> None:
        """Remove a folder, too, after the processes; its absolute path must be without white space."""
        path = str(folder)
        if not path.startswith("/") or path.split() != [path]:
            raise ValueError(f"the folder is {path!r}, expected an absolute path without white space")
        self._write(path)

    def cut(self) -> None:
        """Kill what is tied and still lives, now; a second time does nothing."""
        if self._guard.poll() is None:
            self._write("cut")
            self._guard.wait(timeout=10)

    def _write(self, word: str) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(word + "\n")
        self._guard.stdin.flush()


def start_time(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]

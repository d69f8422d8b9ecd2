"""End what outlives its owner: a tiny process that waits for the owner's end and then cleans up after it.

Ray's own servants take a minute to notice that their owner was killed, and what an actor started (an
engine's core, say) may never notice. The owner starts `python -m verl.utils.reaper FOLDER PID...` and holds
its standard input; when that closes, for whatever reason, the processes PID and all that carry `MARK=FOLDER`
in their environment are killed and FOLDER is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

MARK = "VERL_RAY_FOLDER"
_GRACE_S = 2.0


def start_reaper(folder: Path) -> subprocess.Popen[bytes]:
    """Watch over this process and its marked children. Close `stdin` of the result: it cleans up and ends."""
    marked = [child for child in psutil.Process().children() if MARK in _read_environment(child)]
    # Children of children by descent: Ray's agents overwrite their environment with their title.
    pids = [str(process.pid) for child in marked for process in (child, *child.children(recursive=True))]
    # A session of its own: the Ctrl-C that ends the owner must not end the reaper.
    return subprocess.Popen(
        [sys.executable, "-m", "verl.utils.reaper", str(folder), *pids],
        stdin=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )


def _read_environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


def _reap(folder: str, watched: list[psutil.Process]) -> None:
    psutil.wait_procs(watched, timeout=_GRACE_S)
    marked = [process for process in psutil.process_iter() if _read_environment(process).get(MARK) == folder]
    doomed = [process for process in (*watched, *marked) if process.pid != os.getpid()]
    for process in doomed:
        # psutil compares start times: whoever merely inherited a watched number is left alone.
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(doomed, timeout=_GRACE_S)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    folder, *pids = sys.argv[1:]
    watched = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            watched.append(psutil.Process(int(pid)))
    sys.stdin.buffer.read()
    _reap(folder, watched)


if __name__ == "__main__":
    main()

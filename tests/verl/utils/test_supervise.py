from __future__ import annotations

import os
import subprocess
import sys

from verl.utils.supervise import MemoryWatch, Supervisor

NUM_BYTES = 200 * 2**20
HOLDER = f"import sys; held = b'x' * {NUM_BYTES}; print('held', flush=True); sys.stdin.read()"
PARENT = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'pass']); "
    "import os; os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT); print('ended', flush=True); "
    "sys.stdin.read()"
)


def start(program: str) -> subprocess.Popen[bytes]:
    """Start a program and wait for its first line."""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_memory_of_a_child_counts_and_its_peak_stays() -> None:
    with Supervisor() as supervisor:
        before = MemoryWatch(supervisor).measure()
        with start(HOLDER) as child:
            with MemoryWatch(supervisor) as watch:  # it measures at least once
                during = watch.measure()
            child.kill()
        assert during - before > NUM_BYTES
        assert watch.peak_bytes - before > NUM_BYTES / 2


def test_a_process_that_has_ended_is_no_descendant() -> None:
    with Supervisor() as supervisor, start(PARENT) as parent:
        assert [process.pid for process in supervisor.descendants()] == [parent.pid]
        parent.kill()
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        assert supervisor.descendants() == []

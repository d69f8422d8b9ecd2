"""What recording a step as a trace costs, on the embedded world's policy."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scale.packing import quickstart_step
from verl.workers.batch import make_mini_batches

STEP = 1


def wall_seconds(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure() -> dict[str, float]:
    """Return seconds of an update of a step of the quickstart, recorded and not, and MB of its trace."""
    worker, batch = quickstart_step()
    (minis,) = make_mini_batches(batch, num_ranks=1, mini_batch_size=80, max_tokens=4096)
    wall_seconds(lambda: worker.update(minis))  # the first fills caches
    plain_s = wall_seconds(lambda: worker.update(minis))
    worker.start_profile()
    recorded_s = wall_seconds(lambda: worker.update(minis))
    with tempfile.TemporaryDirectory() as folder:
        write_s = wall_seconds(lambda: worker.write_profile(folder, step=STEP, spans=[]))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "update_s": round(plain_s, 3),
        "recorded_update_s": round(recorded_s, 3),
        "write_trace_s": round(write_s, 3),
        "trace_mb": round(size / 1e6, 3),
    }

"""Record chosen steps as traces, `trainer.profile_steps`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from verl.run.folder import PROFILES
from verl.utils.timing import Timer
from verl.workers.worker_group import WorkerGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiler:
    """Which steps are recorded, and where their traces go; by default none."""

    folder: Path = Path(PROFILES)
    steps: frozenset[int] = frozenset()

    @asynccontextmanager
    async def recorded(self, step: int, *, policy: WorkerGroup, timer: Timer) -> AsyncIterator[None]:
        """Record the block if this step is one of `steps`: the ranks' passes and the spans of the timer."""
        if step not in self.steps:
            yield
            return
        await policy.start_profile()
        yield
        await policy.write_profile(self.folder, step=step, spans=timer.spans)
        logger.info("step %d is recorded in %s; open its files at https://ui.perfetto.dev", step, self.folder)

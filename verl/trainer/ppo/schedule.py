"""When the episodes of a step are sampled: before it trains (`sync`), or while the step before trains.

`one_step_off`: W_k are the weights after step k, and the batch of step k + 1 is sampled while step k trains:

    engines   batch 1 by W_0 | batch 2 by W_0  | W_1 | batch 3 by W_1  | W_2 | ...
    policy                   | step 1: W_0→W_1 |     | step 2: W_1→W_2 |     | ...

A batch is at most one update older than the weights that it trains. Engines get weights between rollouts
only, so that all completions of a rollout come from the same ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from verl.algorithms.base import Prefetch
from verl.errors import RolloutError
from verl.trainer.config.schema import ONE_STEP_OFF, SYNC
from verl.trainer.ppo.sampling import Collected
from verl.types import Group
from verl.utils.timing import Timer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """The episodes of one step, sampled by the weights of one version."""

    collected: Collected
    prefetch: Prefetch
    """What was requested about them: open, and closed by the step that they belong to."""
    sampler: dict[str, int]
    """`state_dict()` of the question sampler after the questions of this step."""
    seconds: float
    hidden_s: float = 0.0
    """Seconds of them that passed while the step before trained."""


class Engines(Protocol):
    """The part of the engine pool that a schedule uses."""

    async def sleep(self) -> None:
        """Free the engines' GPU memory until the next publish; do nothing where they do not share it."""
        ...


Sample = Callable[[int], Awaitable[Rollout]]
"""Run the episodes of a step."""


class Sync:
    """Samples a step when it begins; the engines sleep while it trains."""

    max_staleness: ClassVar[int] = 0

    def __init__(self, sample: Sample, *, engines: Engines, timer: Timer, last_step: int) -> None:
        self._sample = sample
        self._engines = engines
        self._timer = timer
        self._last_step = last_step

    async def rollout(self, step: int) -> Rollout:
        """Return the episodes of a step."""
        with self._timer("rollout"):  # all episodes at once, each at its own pace
            return await self._sample(step)

    @asynccontextmanager
    async def training(self, step: int) -> AsyncIterator[None]:  # noqa: ARG002
        """Let the step train inside the block, after which engines take new weights."""
        await self._engines.sleep()
        yield

    async def aclose(self) -> None:
        """Stop what runs ahead of the present step."""


class OneStepOff(Sync):
    """Samples the next step while a step trains; the engines stay awake."""

    max_staleness: ClassVar[int] = 1

    def __init__(self, sample: Sample, *, engines: Engines, timer: Timer, last_step: int) -> None:
        super().__init__(sample, engines=engines, timer=timer, last_step=last_step)
        self._ahead: asyncio.Task[Rollout] | None = None
        self._waited_s = 0.0
        """How long the step before waited for it."""

    async def rollout(self, step: int) -> Rollout:
        """Return the episodes of a step; only the first one of a run is sampled now."""
        if self._ahead is None:
            return await super().rollout(step)
        rollout, self._ahead = self._ahead.result(), None
        return replace(rollout, hidden_s=max(0.0, rollout.seconds - self._waited_s))

    @asynccontextmanager
    async def training(self, step: int) -> AsyncIterator[None]:
        """Let the step train and sample the next one inside the block, whose end waits for both."""
        if step < self._last_step:
            self._ahead = asyncio.create_task(self._run(step + 1))
        yield
        if self._ahead is None:
            return
        began = time.perf_counter()
        with self._timer("rollout"):
            await asyncio.wait([self._ahead])
        self._waited_s = time.perf_counter() - began
        if (error := self._ahead.exception()) is not None:
            self._ahead = None
            raise error

    async def aclose(self) -> None:
        """Stop the rollout that runs ahead, and close what was requested about it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        ahead.cancel()
        await asyncio.wait([ahead])
        if not ahead.cancelled() and ahead.exception() is None:
            await ahead.result().prefetch.aclose()

    async def _run(self, step: int) -> Rollout:
        try:
            return await self._sample(step)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            logger.error("the episodes of step %d failed, step %d is finished first: %s", step, step - 1, why)
            raise


SCHEDULES: Mapping[str, type[Sync]] = {SYNC: Sync, ONE_STEP_OFF: OneStepOff}
"""By `trainer.schedule`."""


def measure_staleness(groups: Sequence[Group], *, step: int, max_staleness: int) -> dict[str, float]:
    """Return mean (over sampled tokens) and largest number of updates between sampling and trained weights.

    Failed trajectories do not count. Raises RolloutError for a turn that is older than `max_staleness`, or
    newer than what the step trains.
    """
    trained = [t for group in groups for t in group.trajectories if t.failure is None]
    turns = [turn for t in trained for turn in t.turns if len(turn.output_ids)]
    if not turns:
        return {}
    ages = [step - 1 - turn.version for turn in turns]
    if min(ages) < 0 or max(ages) > max_staleness:
        versions = ", ".join(map(str, sorted({turn.version for turn in turns})))
        raise RolloutError(
            f"step {step} trains the weights of version {step - 1}, and its episodes were sampled by version "
            f"{versions}: at most {max_staleness} older is allowed by trainer.schedule"
        )
    counts = [len(turn.output_ids) for turn in turns]
    mean = sum(age * count for age, count in zip(ages, counts, strict=True)) / sum(counts)
    return {"policy/staleness_mean": mean, "policy/staleness_max": float(max(ages))}

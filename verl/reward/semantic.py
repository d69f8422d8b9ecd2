"""Information gain of InfoReasoner: how far search results move a frozen model towards the right answer.

The IG service samples short answers with and without the results and compares the mass of the right meaning.
This module decides which trajectories are worth asking about, asks as early as it can, and turns replies into
facts. A gain depends on its question, context and golds only, not on when it was asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from verl.protocols import OnEpisodeEnd
from verl.types import Gain, Group, Question, Stop, Trajectory
from verl.utils.reward_score.IG_client import GainRequest, GainResult

logger = logging.getLogger(__name__)

NOTHING_TO_MEASURE = Gain()
VISIBLE, HIDDEN = "perf/gain_visible_s", "perf/gain_hidden_s"
"""Seconds that a step waited for gains once its episodes had ended; seconds in which at least one request for
a gain was under way while episodes still ran."""
_WORK = ("prompts_sampled", "baselines_sampled", "answers_sampled", "answers_empty", "pairs_judged")
"""Counters of the service that become metrics of their own."""


class GainClient(Protocol):
    """The part of the IG service's client that is needed here."""

    @property
    def work(self) -> Mapping[str, int]:
        """The service's own account of all work it did for this client so far."""
        ...

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        """One result per request, in order; failures are in the results."""
        ...

    async def submit(self, request: GainRequest) -> GainResult:
        """The result of one request; a failure is in the result."""
        ...


class SemanticGain:
    """A `GainEstimator` backed by the IG service: one scalar per trajectory over all its search results."""

    def __init__(
        self, client: GainClient, *, render_context: Callable[[Trajectory], str], timeout_s: float
    ) -> None:
        """`render_context` gives the passages of a trajectory as the text the policy read.

        `timeout_s`: the longest that `measure` waits.
        """
        self._client = client
        self._render_context = render_context
        self._timeout_s = timeout_s
        self._early = _EarlyAnswers(client)
        self._accounted: Mapping[str, int] = {}
        """Work of the service that earlier figures tell."""
        self._figures: dict[str, float] = {}

    @property
    def figures(self) -> Mapping[str, float]:
        """Of the last `measure`: seconds visible and hidden, and what the service did for the step."""
        return self._figures

    @asynccontextmanager
    async def asking_early(self, questions: Sequence[Question]) -> AsyncIterator[OnEpisodeEnd]:
        """Ask for the baselines at once and for every gain as soon as its episode has ended."""
        for question in questions:
            self._early.ask(GainRequest(question=question.text, context="", golds=question.golds))

        def on_episode_end(trajectory: Trajectory) -> None:
            if has_gain(trajectory):
                self._early.ask(self._request(trajectory))

        try:
            yield on_episode_end
        finally:
            await self._early.forget()

    async def measure(self, groups: Sequence[Group]) -> list[list[Gain]]:
        """Gains of all trajectories that searched and answered; asks for what was not asked for yet."""
        started, hidden_s = time.perf_counter(), self._early.busy_s()
        wanted = [[self._request(t) if has_gain(t) else None for t in group.trajectories] for group in groups]
        requests = dict.fromkeys(request for of_group in wanted for request in of_group if request)
        results = await self._results(list(requests))
        visible_s = time.perf_counter() - started
        self._figures = {VISIBLE: visible_s, HIDDEN: hidden_s, **self._account()}
        return [
            [NOTHING_TO_MEASURE if request is None else _as_gain(results[request]) for request in of_group]
            for of_group in wanted
        ]

    def _request(self, trajectory: Trajectory) -> GainRequest:
        question = trajectory.question
        return GainRequest(
            question=question.text, context=self._render_context(trajectory), golds=question.golds
        )

    async def _results(self, requests: Sequence[GainRequest]) -> dict[GainRequest, GainResult]:
        """By the deadline at the latest. An early request that failed in passing says nothing: ask again."""
        deadline = time.monotonic() + self._timeout_s
        asked = [request for request in requests if request in self._early]
        fresh = [request for request in requests if request not in self._early]
        results = dict(zip(fresh, await self._client.compute(fresh), strict=True)) if fresh else {}
        results |= await self._early.results(asked, timeout_s=deadline - time.monotonic())
        self._early.report_failures()
        again = [request for request in asked if results[request].retryable]
        left_s = deadline - time.monotonic()
        if again and left_s > 0:
            repeated = await self._client.compute(again, timeout_s=left_s)
            results |= dict(zip(again, repeated, strict=True))
        return results

    def _account(self) -> dict[str, float]:
        """What the service did since the last time, as far as it says."""
        before, self._accounted = self._accounted, self._client.work
        return {
            f"ig/{name}": float(self._accounted[name] - before.get(name, 0))
            for name in _WORK
            if name in self._accounted
        }


class _EarlyAnswers:
    """Requests of one step that were sent while its episodes ran."""

    def __init__(self, client: GainClient) -> None:
        self._client = client
        self._tasks: dict[GainRequest, asyncio.Task[GainResult]] = {}
        self._num_under_way = 0
        self._busy_s = 0.0
        self._busy_since = 0.0

    def __contains__(self, request: GainRequest) -> bool:
        return request in self._tasks

    def ask(self, request: GainRequest) -> None:
        if request in self._tasks:
            return
        if self._num_under_way == 0:
            self._busy_since = time.perf_counter()
        self._num_under_way += 1
        task = asyncio.create_task(self._client.submit(request))
        task.add_done_callback(self._note_end)
        self._tasks[request] = task

    def busy_s(self) -> float:
        """Seconds so far in which at least one request was under way."""
        return self._busy_s + (time.perf_counter() - self._busy_since if self._num_under_way else 0.0)

    async def results(
        self, requests: Sequence[GainRequest], *, timeout_s: float
    ) -> dict[GainRequest, GainResult]:
        """Of requests that were asked; those that are not known in time may be asked again."""
        tasks = [self._tasks[request] for request in requests]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, timeout_s))
        late = GainResult(gain=None, error="late; raise reward.semantic.timeout_s", retryable=True)
        return {r: t.result() if t.done() else late for r, t in zip(requests, tasks, strict=True)}

    def report_failures(self) -> None:
        """One line for all: they cost time, not gains."""
        errors = [error for task in self._ended() if (error := task.result().error) is not None]
        if errors:
            logger.warning(
                "%d of %d early requests for gains failed, the first by: %s",
                len(errors),
                len(self._tasks),
                errors[0],
            )

    async def forget(self) -> None:
        """Stop what is under way and start anew."""
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._busy_s = 0.0

    def _ended(self) -> Iterable[asyncio.Task[GainResult]]:
        return (task for task in self._tasks.values() if task.done() and not task.cancelled())

    def _note_end(self, _: asyncio.Task[GainResult]) -> None:
        until_now = self.busy_s()
        self._num_under_way -= 1
        if self._num_under_way == 0:
            self._busy_s = until_now


def has_gain(trajectory: Trajectory) -> bool:
    """Whether there is a gain to measure: it did not fail, read at least one passage, and gave an answer.

    Without an answer the published reward is 0 whatever was found, so no gain is paid for it.
    """
    return trajectory.stop is not Stop.FAILED and trajectory.answer is not None and bool(trajectory.passages)


def _as_gain(result: GainResult) -> Gain:
    if result.gain is None:
        return Gain(failure=f"gain_failed: {result.error}")
    return Gain(value=result.gain)

"""Run the episodes of a step: questions x samples -> groups, all at once, under one failure policy.

Episodes run in as many coroutines as may run at a time, each with a seed of its own, so that a slow tool call
delays no other episode and the result does not depend on the order in which episodes end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from verl.errors import RolloutError
from verl.protocols import Agent, OnEpisodeEnd
from verl.types import Group, Question, Stop, Trajectory
from verl.utils.actors import ActorError
from verl.utils.failures import check_failure_share
from verl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (number finished, number of all) after every episode."""


@dataclass(frozen=True, slots=True)
class _Episode:
    question: Question
    sample: int
    seed: int
    greedy: bool


class Collector:
    """Runs episodes under one failure policy; keeps no state between calls."""

    def __init__(
        self, agent: Agent, *, n: int, max_concurrent: int, max_failure_share: float, seed: int
    ) -> None:
        """Run `n` episodes per question, at most `max_concurrent` at a time."""
        self._agent = agent
        self._n = n
        self._max_concurrent = max_concurrent
        self._max_failure_share = max_failure_share
        self._seed = seed

    async def collect(
        self,
        questions: Sequence[Question],
        *,
        step: int,
        progress: Progress | None = None,
        on_episode_end: OnEpisodeEnd | None = None,
    ) -> list[Group]:
        """Return one group per question, in order, failed trajectories included and named.

        Raises TrainingHaltedError as soon as more than the allowed share has failed, ActorError when an
        engine has died.
        """
        episodes = [
            _Episode(
                question, sample, derive_seed(self._seed, "rollout", step, question.uid, sample), greedy=False
            )
            for question in questions
            for sample in range(self._n)
        ]
        played = await self._play_all(episodes, progress=progress, on_episode_end=on_episode_end)
        return [
            Group(question=question, trajectories=tuple(played[k * self._n : (k + 1) * self._n]))
            for k, question in enumerate(questions)
        ]

    async def evaluate(
        self, questions: Sequence[Question], *, progress: Progress | None = None
    ) -> list[Trajectory]:
        """Return one greedy trajectory per question, in order. Raises TrainingHaltedError as `collect`."""
        episodes = [self._evaluation_episode(question, 0, greedy=True) for question in questions]
        return await self._play_all(episodes, progress=progress)

    async def answer(
        self,
        questions: Sequence[Question],
        *,
        greedy: bool,
        done: Collection[tuple[str, int]],
        progress: Progress,
        on_episode_end: OnEpisodeEnd,
    ) -> None:
        """Play one greedy or `n` sampled episodes per question, but those of `done`; keep no trajectory.

        `done` are pairs of uid and sample; they count as finished, without a failure. Raises
        TrainingHaltedError as `collect`.
        """
        episodes = [
            self._evaluation_episode(question, sample, greedy=greedy)
            for question in questions
            for sample in range(1 if greedy else self._n)
            if (question.uid, sample) not in done
        ]
        await self._play(episodes, num_done=len(done), progress=progress, on_episode_end=on_episode_end)

    def _evaluation_episode(self, question: Question, sample: int, *, greedy: bool) -> _Episode:
        seed = derive_seed(self._seed, "evaluation", question.uid, sample)
        return _Episode(question, sample, seed, greedy=greedy)

    async def _play_all(
        self,
        episodes: Sequence[_Episode],
        *,
        progress: Progress | None,
        on_episode_end: OnEpisodeEnd | None = None,
    ) -> list[Trajectory]:
        """Return the trajectories in the order of the episodes."""
        played: dict[tuple[str, int], Trajectory] = {}

        def keep(trajectory: Trajectory) -> None:
            played[trajectory.question.uid, trajectory.sample] = trajectory
            if on_episode_end is not None:
                on_episode_end(trajectory)

        await self._play(episodes, progress=progress, on_episode_end=keep)
        return [played[episode.question.uid, episode.sample] for episode in episodes]

    async def _play(
        self,
        episodes: Sequence[_Episode],
        *,
        num_done: int = 0,
        progress: Progress | None,
        on_episode_end: OnEpisodeEnd,
    ) -> None:
        """Play the episodes; `num_done` more have been played before."""
        waiting = iter(episodes)
        failures: list[str] = []
        num_finished, total = num_done, num_done + len(episodes)

        async def play() -> None:
            nonlocal num_finished
            for episode in waiting:  # each is taken by one of the tasks
                trajectory = await self._run(episode)
                num_finished += 1
                if trajectory.failure is not None:
                    self._count_failure(trajectory, failures, total=total)
                on_episode_end(trajectory)
                if progress is not None:
                    progress(num_finished, total)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._max_concurrent, len(episodes))):
                    group.create_task(play())
        except BaseExceptionGroup as stopped:
            raise stopped.exceptions[0] from None

    def _count_failure(self, trajectory: Trajectory, failures: list[str], *, total: int) -> None:
        """Add the failure. Raises TrainingHaltedError when too large a share of `total` has failed."""
        failure = trajectory.failure or ""
        if failure not in failures:
            logger.warning("an episode of %s failed: %s", trajectory.question.uid, failure)
        failures.append(failure)
        check_failure_share(
            failures,
            total=total,
            max_share=self._max_failure_share,
            what="episodes",
            fix="repair the tool or the engine that the first failure names.",
        )

    async def _run(self, episode: _Episode) -> Trajectory:
        question = episode.question
        try:
            return await self._agent.run(
                question, sample=episode.sample, seed=episode.seed, greedy=episode.greedy
            )
        except ActorError:
            raise  # a replica does not come back: no step can be finished
        except RolloutError as error:
            failure = f"generation_failed: {error}"
        except Exception as error:
            # A defect that shows in one episode must not lose the others.
            logger.exception("episode %s, sample %d, broke", question.uid, episode.sample)
            failure = f"episode_broke: {type(error).__name__}: {error}"
        return Trajectory(
            question=question,
            sample=episode.sample,
            prompt_ids=np.zeros(0, dtype=np.int32),
            turns=(),
            stop=Stop.FAILED,
            failure=failure,
        )

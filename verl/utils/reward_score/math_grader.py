"""Grade answers to mathematical problems in processes that can be ended, so that no answer can stop a run.

`math-verify` compares expressions: fractions, sets, intervals, matrices, written in LaTeX or not. Its own
limits of time are signals, which only a main thread can receive, and which do not end all of its work.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue

from verl.errors import ConfigError
from verl.protocols import Agent
from verl.types import Question, Trajectory

_WORKER = Path(__file__).with_name("math_worker.py")
_MAX_WORKERS = 8
_MAX_GRADES = 1 << 16


_WALL_TIME_FACTOR = 10
"""The longest time of one answer, in CPU limits: long enough for a busy machine."""
_START_TIME_S, _END_TIME_S = 300.0, 10.0
_CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)
"""Exit statuses that an answer can cause, such as that of a stack overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The verdict on one answer; exactly one of `score` and `failure` is set."""

    score: float | None = None
    """1.0 where the answer equals a gold answer, else 0.0."""
    is_unfinished: bool = False
    """Whether the score is 0.0 because grading the answer reached the CPU limit or crashed."""
    failure: str | None = None
    """Why there is no verdict, for reasons other than the answer, such as
    `math_failed: the grader ended with status -9`."""


class NoReplyError(Exception):
    """A process ended, or did not reply in time.

    `status` is its exit status; None if it failed at its start or was killed because it did not reply.
    """

    def __init__(self, status: int | None, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class GradingError(Exception):
    """There is no verdict, for a reason other than the answer."""


class MathGrader:
    """Grades answers, several at a time; keeps the verdicts."""

    def __init__(self, *, cpu_time_s: float) -> None:
        """Start nothing. `cpu_time_s` is the longest computing time of one answer."""
        self._cpu_time_s = cpu_time_s
        self._threads = ThreadPoolExecutor(
            min(_MAX_WORKERS, len(os.sched_getaffinity(0))), thread_name_prefix="math-grader"
        )
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._find = lru_cache(_MAX_GRADES)(self._ask)
        self._failed: dict[tuple[str, tuple[str, ...]], Grade] = {}
        """Verdicts on answers whose last attempt failed; `prepare` tries them again."""

    async def connect(self) -> None:
        """Grade a first answer. Raises ConfigError where that is not possible."""
        grade = await asyncio.get_running_loop().run_in_executor(self._threads, self.grade, "1/2", ("0.5",))
        if grade.score != 1.0:
            raise ConfigError(
                f"reward.outcome=math cannot grade answers: {grade.failure or 'it takes 1/2 for wrong'}; "
                "install the packages of the lock file (make venv)"
            )

    def grade(self, answer: str, golds: Sequence[str]) -> Grade:
        """Return the verdict on an answer: at once after `prepare`, else after computing."""
        key = (answer, tuple(golds))
        if (failed := self._failed.get(key)) is not None:
            return failed
        try:
            return self._find(*key)
        except GradingError as error:
            return self._failed.setdefault(key, Grade(failure=f"math_failed: {error}"))

    async def prepare(self, answer: str, golds: Sequence[str]) -> None:
        """Find the verdict on an answer, which `grade` then returns at once; try again what failed before."""
        self._failed.pop((answer, tuple(golds)), None)
        await asyncio.get_running_loop().run_in_executor(self._threads, self.grade, answer, golds)

    async def aclose(self) -> None:
        """Wait for the verdicts that are being found, and end the processes."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        with suppress(Empty):
            while True:
                self._idle.get_nowait().end()

    def _ask(self, answer: str, golds: tuple[str, ...]) -> Grade:
        """Return the verdict of an idle process, or of a new one; if there is none, that of another new one.

        Raises GradingError where there is no verdict, for a reason other than the answer.
        """
        request = json.dumps({"answer": answer, "golds": golds})
        try:
            try:
                reply = self._exchange(request, is_new=False)
            except NoReplyError as error:
                if error.status == -signal.SIGPROF:
                    raise
                reply = self._exchange(request, is_new=True)
        except NoReplyError as error:
            if error.status in (-signal.SIGPROF, *_CRASHES):
                return Grade(score=0.0, is_unfinished=True)
            raise GradingError(str(error)) from error
        if "score" not in reply:
            raise GradingError(str(reply["error"]))
        return Grade(score=float(str(reply["score"])))

    def _exchange(self, request: str, *, is_new: bool) -> dict[str, object]:
        """Return the reply of a process, a new one if `is_new`. Raises NoReplyError."""
        worker = None
        if not is_new:
            with suppress(Empty):
                worker = self._idle.get_nowait()
        if worker is None:
            worker = _Worker(self._cpu_time_s)
        reply = worker.exchange(request, timeout_s=_WALL_TIME_FACTOR * self._cpu_time_s)
        self._idle.put(worker)
        return reply


class _Worker:
    """A process that grades one answer after the other."""

    def __init__(self, cpu_time_s: float) -> None:
        """Start the process and wait until it is ready. Raises NoReplyError."""
        self._channel, end = socket.socketpair()
        self._replies = self._channel.makefile("rb")
        with end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), str(cpu_time_s)],
                stdin=end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt of the terminal is for the trainer
            )
        try:
            self.exchange(None, timeout_s=_START_TIME_S)
        except NoReplyError as error:
            raise NoReplyError(None, f"at its start: {error}") from error  # no answer caused that

    def exchange(self, request: str | None, *, timeout_s: float) -> dict[str, object]:
        """Return the reply to a request, or the first line of a new process.

        Raises NoReplyError if there is none in time; then the process has ended.
        """
        self._channel.settimeout(timeout_s)
        line = b""
        try:
            if request is not None:
                self._channel.sendall(f"{request}\n".encode())
            line = self._replies.readline()
        except TimeoutError as error:
            self._process.kill()
            self.end()
            raise NoReplyError(None, f"no reply of the grader within {timeout_s:g} s") from error
        except ConnectionError:
            pass  # the process has ended
        if not line.endswith(b"\n"):
            status = self.end()
            raise NoReplyError(status, f"the grader ended with status {status}")
        reply: dict[str, object] = json.loads(line)
        return reply

    def end(self) -> int:
        """End the process and return its status."""
        self._replies.close()
        self._channel.close()
        try:
            return self._process.wait(_END_TIME_S)
        except subprocess.TimeoutExpired:  # stopped, for example
            self._process.kill()
            return self._process.wait()


class GradingAgent:
    """An agent whose answers are graded where their episode ends, so that no other episode waits for it."""

    def __init__(self, agent: Agent, grader: MathGrader) -> None:
        self._agent = agent
        self._grader = grader

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        """Return the trajectory, its answer graded."""
        trajectory = await self._agent.run(question, sample=sample, seed=seed, greedy=greedy)
        if trajectory.answer is not None:
            await self._grader.prepare(trajectory.answer, question.golds)
        return trajectory

"""Grade answers to mathematical problems in processes that can be ended, so that no answer can stop a run.

`math-verify` compares expressions: fractions, sets, intervals, matrices, written in LaTeX or not. Its own
limits of time are signals, which only a main thread can receive, and which do not end all of its work.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The verdict on one answer; exactly one of the two is set."""

    score: float | None = None
    """1.0 where the answer equals a gold answer, else 0.0."""
    failure: str | None = None
    """Why there is no verdict, such as `math_failed: no verdict within 5 s of computing`."""


class MathGrader:
    """Grades answers, several at a time; keeps the verdicts."""

    def __init__(self, *, cpu_time_s: float) -> None:
        """Start nothing. `cpu_time_s` is the longest computing time of one answer."""
        self._cpu_time_s = cpu_time_s
        self._threads = ThreadPoolExecutor(
            min(_MAX_WORKERS, len(os.sched_getaffinity(0))), thread_name_prefix="math-grader"
        )
        self._idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        self._find = lru_cache(_MAX_GRADES)(self._ask)

    async def connect(self) -> None:
        """Grade a first answer. Raises ConfigError where that is not possible."""
        grade = await asyncio.get_running_loop().run_in_executor(self._threads, self.grade, "1/2", ("0.5",))
        if grade.score != 1.0:
            raise ConfigError(
                f"reward.outcome=math cannot grade answers: {grade.failure or 'it takes 1/2 for wrong'}; "
                "install the packages of the lock file (make venv)"
            )

    def grade(self, answer: str, golds: Sequence[str]) -> Grade:
        """Return the verdict on an answer: at once where `prepare` was awaited, else after computing."""
        return self._find(answer, tuple(golds))

    async def prepare(self, answer: str, golds: Sequence[str]) -> None:
        """Find the verdict on an answer, which `grade` then returns at once."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self.grade, answer, golds)

    async def aclose(self) -> None:
        """Wait for the verdicts that are being found, and end the processes."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        with suppress(Empty):
            while True:
                _end(self._idle.get_nowait())

    def _ask(self, answer: str, golds: tuple[str, ...]) -> Grade:
        """Return the verdict of an idle process, or of a new one; one that ended is not used again."""
        try:
            worker = self._idle.get_nowait()
        except Empty:
            worker = self._start()
        request = json.dumps({"answer": answer, "golds": golds})
        reply = _exchange(worker, request)
        if reply is None:
            status = _end(worker)
            reason = f"the grader ended with status {status}"
            if status == -signal.SIGPROF:
                reason = f"no verdict within {self._cpu_time_s:g} s of computing"
            return Grade(failure=f"math_failed: {reason}")
        self._idle.put(worker)
        if "score" in reply:
            return Grade(score=float(str(reply["score"])))
        return Grade(failure=f"math_failed: {reply['error']}")

    def _start(self) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._cpu_time_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # an interrupt of the terminal is for the trainer
        )
        _exchange(worker, None)
        return worker


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


def _exchange(worker: subprocess.Popen[str], request: str | None) -> dict[str, object] | None:
    """Return the reply to a request, or the first line of a new process; None if the process has ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        if request is not None:
            worker.stdin.write(f"{request}\n")
            worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        return None
    return json.loads(line) if line.endswith("\n") else None


def _end(worker: subprocess.Popen[str]) -> int:
    """End a process and return its status."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with suppress(BrokenPipeError):
        worker.stdin.close()
    status = worker.wait()
    worker.stdout.close()
    return status

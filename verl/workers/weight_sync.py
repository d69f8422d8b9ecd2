"""Publish the policy's weights to every engine, and make sure that they arrived.

Weights travel as a safetensors file in memory (`/dev/shm` where there is one). After each publish a fixed
probe sequence is scored by the trainer and by every engine; if they disagree the run must not go on, because
it would sample from another policy than it trains.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from verl.errors import WeightSyncError
from verl.types import FloatArray, IntArray

_PREFIX = "verl-weights-"
_LOCK_FILE = "lock"
_MIN_STALE_AGE_S = 60.0


class WeightSource(Protocol):
    """What a publisher needs of the policy."""

    async def export_weights(self, folder: Path) -> None: ...

    async def probe(self, ids: IntArray) -> FloatArray: ...


class WeightReceiver(Protocol):
    """What a publisher needs of an engine."""

    async def load_weights(self, folder: str, version: int) -> None:
        """Take over the `*.safetensors` of the folder; completions carry `version` from then on."""
        ...

    async def score(self, ids: IntArray) -> FloatArray:
        """Log-prob of every token given those before it, at temperature 1 [L]; position 0 holds 0."""
        ...


class WeightPublisher:
    """Bring the weights of one policy to its engines. Close it at the end: it owns a folder in memory."""

    def __init__(
        self,
        policy: WeightSource,
        receivers: Sequence[WeightReceiver],
        *,
        probe_ids: IntArray,
        tolerance: float,
        memory: Path | None = None,
    ) -> None:
        """`tolerance`: largest mean absolute log-prob difference, 1e-3 in float32."""
        if len(probe_ids) < 2:
            raise ValueError(f"the probe needs at least two tokens, got {len(probe_ids)}")
        self._policy = policy
        self._receivers = tuple(receivers)
        self._probe_ids = np.asarray(probe_ids, dtype=np.int32)
        self._tolerance = tolerance
        memory = memory or _find_memory()
        _remove_stale_folders(memory)
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=memory))
        self._lock = _lock_folder(self._folder)

    async def publish(self, *, version: int) -> float:
        """Give every engine the policy's weights; the largest difference found over the engines.

        Raises WeightSyncError if an engine scores the probe differently.
        """
        folder = self._folder / f"version_{version}"
        try:
            await self._policy.export_weights(folder)
            await asyncio.gather(
                *(receiver.load_weights(str(folder), version) for receiver in self._receivers)
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        expected, *scores = await asyncio.gather(
            self._policy.probe(self._probe_ids),
            *(receiver.score(self._probe_ids) for receiver in self._receivers),
        )
        return max(
            (self._compare(i, expected, score, version) for i, score in enumerate(scores)), default=0.0
        )

    def close(self) -> None:
        self._lock.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _compare(self, engine: int, expected: FloatArray, score: FloatArray, version: int) -> float:
        if len(score) != len(expected):
            raise WeightSyncError(f"engine {engine} scored {len(score)} of {len(expected)} probe tokens")
        difference = float(np.abs(expected[1:] - score[1:]).mean())
        if difference <= self._tolerance:  # False for NaN
            return difference
        raise WeightSyncError(
            f"engine {engine} does not sample from the policy that is trained: after publishing version "
            f"{version} its log-probs of the probe sequence differ by {difference:.3g} on average, at most "
            f"{self._tolerance:g} is normal. Likely causes: tied embeddings reloaded on the CPU (start the "
            "engine from the folder that prepare_engine_model gives), another precision in the engine than "
            "in the trainer, or an engine that was started from another model"
        )


def _find_memory() -> Path:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def _lock_folder(folder: Path) -> IO[bytes]:
    lock = (folder / _LOCK_FILE).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _remove_stale_folders(memory: Path) -> None:
    """Free the memory of runs that were killed: their lock is gone, whatever container they ran in."""
    for folder in memory.glob(f"{_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < _MIN_STALE_AGE_S:
                continue  # its owner may be between making it and locking it
            with (folder / _LOCK_FILE).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # locked, gone meanwhile, or someone else's

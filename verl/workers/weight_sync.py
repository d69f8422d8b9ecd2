"""Publish the policy's weights to every engine, and make sure that they arrived.

Weights travel as a safetensors file in memory (`/dev/shm` where there is one). After each publish a fixed
probe sequence is scored by the trainer and by every engine; if they disagree the run must not go on, because
it would sample from another policy than it trains. An update at a small learning rate moves the probe by less
than rounding does, so that check alone would not notice an engine that never takes weights over: `prove`
shows once, with weights that are visibly others, that it does.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from verl.errors import WeightSyncError
from verl.types import FloatArray, IntArray

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "verl-weights-"
_LOCK_FILE = "lock"
_MIN_STALE_AGE_S = 60.0
_MARGIN_BYTES = 2**24
"""For the header of the file, and for others who write to the same memory."""
_VISIBLE_SHARE = 10.0
"""How many times the tolerance the probe must move in `prove`: then rounding cannot explain it."""
_ROUNDING_GROWTH = 3.0
"""Disturbed weights make logits larger, and what rounding does to them."""
_MAX_DISTURBANCES = 6


class WeightSource(Protocol):
    """What a publisher needs of the policy."""

    async def export_weights(self, folder: Path) -> None: ...

    async def export_bytes(self) -> int:
        """Size of what `export_weights` writes."""
        ...

    async def probe(self, ids: IntArray) -> FloatArray: ...

    async def disturb(self) -> None:
        """Change the weights so that every log-prob moves; calls add up."""
        ...

    async def restore(self) -> None:
        """Undo `disturb`, bit for bit; nothing happens without one."""
        ...


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
        """`tolerance`: largest mean absolute log-prob difference, 1e-3 in float32.

        `memory`: where the file is written; by default shared memory if it has room for the weights.
        """
        if len(probe_ids) < 2:
            raise ValueError(f"the probe needs at least two tokens, got {len(probe_ids)}")
        self._policy = policy
        self._receivers = tuple(receivers)
        self._probe_ids = np.asarray(probe_ids, dtype=np.int32)
        self._tolerance = tolerance
        self._memory = memory
        self._folder: Path | None = None
        self._lock: IO[bytes] | None = None

    async def prove(self, *, version: int) -> None:
        """Show that every engine takes weights over, with visibly other ones; then publish the policy's own.

        Raises WeightSyncError for an engine that keeps its weights or takes over others than were sent. The
        policy ends as it was, bit for bit.
        """
        undisturbed, *before = await self._score()
        try:
            await self._disturb(undisturbed)
            await self._transfer(version)
            disturbed, *after = await self._score()
        finally:
            await self._policy.restore()
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if _distance(old, new) <= self._tolerance:
                raise WeightSyncError(
                    f"engine {i} is deaf: it was sent weights that move the log-probs of the probe sequence "
                    f"by {_distance(undisturbed, disturbed):.3g} on average, but its own moved by "
                    f"{_distance(old, new):.3g}. It would sample from its first weights for ever: its "
                    "version of vLLM does not reload this model in place"
                )
            self._compare(i, disturbed, new, version, tolerance=_ROUNDING_GROWTH * self._tolerance)
        await self.publish(version=version)

    async def publish(self, *, version: int) -> float:
        """Give every engine the policy's weights; the largest difference found over the engines.

        Raises WeightSyncError if an engine scores the probe differently.
        """
        await self._transfer(version)
        expected, *scores = await self._score()
        differences = [
            self._compare(i, expected, score, version, tolerance=self._tolerance)
            for i, score in enumerate(scores)
        ]
        return max(differences, default=0.0)

    def close(self) -> None:
        """Free the memory. A second time does nothing."""
        if self._lock is not None:
            self._lock.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _disturb(self, undisturbed: FloatArray) -> None:
        """Change the policy until its probe has moved visibly."""
        needed = _VISIBLE_SHARE * self._tolerance
        moved = 0.0
        for _ in range(_MAX_DISTURBANCES):
            await self._policy.disturb()
            moved = _distance(undisturbed, await self._policy.probe(self._probe_ids))
            if moved >= needed:
                return
        raise WeightSyncError(
            f"the probe sequence cannot tell weights apart: disturbed ones move its log-probs by {moved:.3g} "
            f"on average, {needed:.3g} is needed at a tolerance of {self._tolerance:g}. Lower "
            "actor_rollout_ref.rollout.max_log_prob_difference"
        )

    async def _transfer(self, version: int) -> None:
        if self._folder is None:
            self._folder = await self._make_folder()
        folder = self._folder / f"version_{version}"
        try:
            await self._policy.export_weights(folder)
            await asyncio.gather(
                *(receiver.load_weights(str(folder), version) for receiver in self._receivers)
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _make_folder(self) -> Path:
        memory = self._memory or find_memory(await self._policy.export_bytes())
        _remove_stale_folders(memory)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=memory))
        self._lock = _lock_folder(folder)
        return folder

    async def _score(self) -> list[FloatArray]:
        """The probe as the policy scores it, then as every engine does."""
        return await asyncio.gather(
            self._policy.probe(self._probe_ids),
            *(receiver.score(self._probe_ids) for receiver in self._receivers),
        )

    def _compare(
        self, engine: int, expected: FloatArray, score: FloatArray, version: int, *, tolerance: float
    ) -> float:
        if len(score) != len(expected):
            raise WeightSyncError(f"engine {engine} scored {len(score)} of {len(expected)} probe tokens")
        difference = _distance(expected, score)
        if difference <= tolerance:  # False for NaN
            return difference
        raise WeightSyncError(
            f"engine {engine} does not sample from the policy that is trained: after publishing version "
            f"{version} its log-probs of the probe sequence differ by {difference:.3g} on average, at most "
            f"{tolerance:g} is normal. Likely causes: tied embeddings reloaded on the CPU (start the "
            "engine from the folder that prepare_engine_model gives), another precision in the engine than "
            "in the trainer, or an engine that was started from another model"
        )


def _distance(one: FloatArray, other: FloatArray) -> float:
    """Mean absolute difference after position 0, which has no log-prob."""
    return float(np.abs(one[1:] - other[1:]).mean())


def find_memory(num_bytes: int, *, shared: Path = _SHARED_MEMORY) -> Path:
    """Shared memory if it holds so many bytes (containers often give it 64 MiB), else the temp folder."""
    if shared.is_dir() and os.access(shared, os.W_OK):
        _remove_stale_folders(shared)
        free = shutil.disk_usage(shared).free
        if free >= num_bytes + _MARGIN_BYTES:
            return shared
        logger.warning(
            "%s has %.1f GiB free, the weights need %.1f: they travel over the disk, which is slower; "
            "give it more (docker run --shm-size)",
            shared,
            free / 2**30,
            num_bytes / 2**30,
        )
    return Path(tempfile.gettempdir())


def _lock_folder(folder: Path) -> IO[bytes]:
    lock = (folder / _LOCK_FILE).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _remove_stale_folders(memory: Path) -> None:
    """Free the memory of runs that were killed: their lock is gone, whatever container they ran in.

    Other users can write to `memory`: only folders of this user are opened, and nothing that is not a folder.
    """
    for folder in memory.glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if not is_ours or time.time() - status.st_mtime < _MIN_STALE_AGE_S:
                continue  # a young one's owner may be between making it and locking it
            lock = os.open(folder / _LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(lock, "rb"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # locked, or gone meanwhile

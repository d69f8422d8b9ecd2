"""Publish the policy's weights to every engine, and check that they arrived.

Weights travel as a safetensors file in memory (`/dev/shm` where there is one). After each publish the trainer
and every engine score a fixed probe sequence; if they disagree the run stops, because it would sample from
another policy than it trains. An update at a small learning rate moves the probe by less than rounding does,
so this check alone does not notice an engine that keeps stale weights: `verify` publishes visibly perturbed
weights once, at start.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch

from verl.errors import WeightSyncError
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.types import FloatArray, IntArray
from verl.workers.model import compute_dtype

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "verl-weights-"
_LOCK_FILE = "lock"
_MIN_STALE_AGE_S = 60.0
_MARGIN_BYTES = 2**24
"""Room for the header of the file and for other writers."""
_PROBE_TOKENS = 64
_FLOAT32_TOLERANCE = 1e-3
_BFLOAT16_TOLERANCE = 0.1
"""Mean absolute log-prob difference that rounding explains."""


class WeightSource(Protocol):
    """The part of the policy that a publisher uses."""

    async def export_weights(self, folder: Path) -> None: ...

    async def export_bytes(self) -> int:
        """Return the size of what `export_weights` writes."""
        ...

    async def probe(self, ids: IntArray) -> FloatArray: ...

    async def perturb(self, *, undo: bool = False) -> None:
        """Change the weights so that every log-prob moves; `undo` takes that back, bit for bit."""
        ...


class WeightReceiver(Protocol):
    """The part of an engine that a publisher uses."""

    async def load_weights(self, folder: str, version: int) -> None:
        """Load the `*.safetensors` of the folder; completions carry `version` from then on."""
        ...

    async def score(self, ids: IntArray) -> FloatArray:
        """Return the log-prob of every token at temperature 1 [L]; position 0 holds 0."""
        ...


class WeightPublisher:
    """Sends the weights of one policy to its engines. Close it at the end: it owns a folder in memory."""

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

    async def verify(self, *, version: int) -> None:
        """Publish perturbed weights, compare, then publish the policy's own.

        Raises WeightSyncError for an engine that keeps stale weights or loads others than were sent, and
        where perturbing moves nothing. The policy ends as it was, bit for bit.
        """
        before = await self._policy.probe(self._probe_ids)
        await self._policy.perturb()
        try:
            # An engine with stale weights differs by the whole shift, a good one by rounding alone, which the
            # doubled logits double.
            shift = _distance(before, await self._policy.probe(self._probe_ids))
            if shift == 0:
                raise WeightSyncError(
                    "perturbing the policy's weights moves no log-prob of the probe sequence, so the check "
                    "cannot tell new weights from stale ones; look at the weights of "
                    "actor_rollout_ref.model.path (an output layer of zeros makes all tokens equally likely)"
                )
            await self._publish(version, tolerance=min(3 * self._tolerance, shift / 3))
        finally:
            await self._policy.perturb(undo=True)
        await self.publish(version=version)

    async def publish(self, *, version: int) -> float:
        """Send the policy's weights to every engine; return the largest difference over the engines.

        Raises WeightSyncError if an engine scores the probe differently.
        """
        return await self._publish(version, tolerance=self._tolerance)

    def close(self) -> None:
        """Free the memory. Calling it again does nothing."""
        if self._lock is not None:
            self._lock.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _publish(self, version: int, *, tolerance: float) -> float:
        await self._transfer(version)
        expected, *scores = await asyncio.gather(
            self._policy.probe(self._probe_ids),
            *(receiver.score(self._probe_ids) for receiver in self._receivers),
        )
        differences = [
            _compare(i, expected, score, version, tolerance=tolerance) for i, score in enumerate(scores)
        ]
        return max(differences, default=0.0)

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


def make_probe(prompts: Iterable[Sequence[int]]) -> IntArray:
    """Return the first 64 tokens of a run's own prompts [<= 64]."""
    return np.fromiter(
        itertools.islice(itertools.chain.from_iterable(prompts), _PROBE_TOKENS), dtype=np.int32
    )


def probe_tolerance(config: ActorRolloutRefConfig, *, device: str) -> float:
    """Return `rollout.max_log_prob_difference`, or what rounding explains at the model's precision."""
    if config.rollout.max_log_prob_difference is not None:
        return config.rollout.max_log_prob_difference
    is_float32 = compute_dtype(config.model, device=device) == torch.float32
    return _FLOAT32_TOLERANCE if is_float32 else _BFLOAT16_TOLERANCE


def _compare(
    engine: int, expected: FloatArray, score: FloatArray, version: int, *, tolerance: float
) -> float:
    """Return the difference between two scores of the probe. Raises WeightSyncError if it is too large."""
    if len(score) != len(expected):
        raise WeightSyncError(f"engine {engine} scored {len(score)} of {len(expected)} probe tokens")
    difference = _distance(expected, score)
    if difference < tolerance:  # False for NaN
        return difference
    raise WeightSyncError(
        f"engine {engine} does not sample from the policy that is trained: after publishing version "
        f"{version} its log-probs of the probe sequence differ by {difference:.3g} on average, at most "
        f"{tolerance:.3g} is normal. Likely causes: a version of vLLM that does not reload this model in "
        "place and keeps stale weights, tied embeddings reloaded on the CPU (start the engine from the "
        "folder of prepare_engine_model), another precision in the engine than in the trainer, or an engine "
        "that was started from another model"
    )


def _distance(one: FloatArray, other: FloatArray) -> float:
    """Return the mean absolute difference after position 0, which has no log-prob."""
    return float(np.abs(one[1:] - other[1:]).mean())


def find_memory(num_bytes: int, *, shared: Path = _SHARED_MEMORY) -> Path:
    """Return shared memory if it has room (containers often have 64 MiB of it), else the temporary folder."""
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
    """Remove the folders of killed runs, which hold no lock any more, also of those in other containers.

    Other users can write to `memory`: only folders of this user are opened, and only if they are folders.
    """
    for folder in memory.glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if not is_ours or time.time() - status.st_mtime < _MIN_STALE_AGE_S:
                continue  # its owner may not have locked it yet
            lock = os.open(folder / _LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(lock, "rb"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # locked by a running process, or removed meanwhile

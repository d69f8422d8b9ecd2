"""Publish the policy's weights to every engine, and check that they arrived.

After each publish the trainer and every engine score a fixed probe sequence; if they disagree the run stops,
because it would sample from another policy than it trains. An update at a small learning rate moves the probe
by less than rounding does, so this check alone does not notice an engine that keeps stale weights: `verify`
publishes weights at start that are perturbed so visibly that a single stale matrix shows.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Protocol

import numpy as np
import torch

from verl.errors import WeightSyncError
from verl.protocols import EnginePart
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.types import FloatArray, IntArray
from verl.utils.shutdown import close_quietly
from verl.workers.model import compute_dtype

_PROBE_TOKENS = 64
_FLOAT32_TOLERANCE = 1e-3
_BFLOAT16_TOLERANCE = 0.1
"""Mean absolute log-prob difference that rounding explains."""
_PERTURBED = 5
"""So many times more of it with perturbed weights."""
_STALE_SHARE = 1 / 20
"""Of the effect of all perturbed weights: a single stale matrix has more, rounding less."""


class WeightSource(Protocol):
    """The part of the policy that a publisher uses."""

    async def probe(self, ids: IntArray) -> FloatArray: ...

    async def num_perturbations(self) -> int:
        """Return how many perturbations together make every stale weight of an engine visible."""
        ...

    async def perturb(self, index: int, *, undo: bool = False) -> None:
        """Change weights so that log-probs move; `undo` restores every bit."""
        ...

    async def release(self) -> None:
        """Make room for the engines on the same GPUs, until the policy is used again."""
        ...


class WeightReceiver(Protocol):
    """The part of an engine that a publisher uses."""

    async def sleep(self) -> None:
        """Free the GPU memory for the policy, weights and cache; do nothing where they do not share one."""
        ...

    async def wake(self, part: EnginePart) -> None:
        """Take back the memory of a part, without its content; do nothing if that is not asleep."""
        ...

    async def score(self, ids: IntArray) -> FloatArray:
        """Return the log-prob of every token at temperature 1 [L]; position 0 holds 0."""
        ...


class WeightTransfer(Protocol):
    """Carries weights: by a file, through GPU memory, or over a network."""

    async def send(self, version: int) -> None:
        """Have every engine use the policy's weights; completions carry `version` from then on.

        Raises WeightSyncError; engines may then have no weights.
        """
        ...


class WeightPublisher:
    """Publishes the weights of one policy to its engines: room on the GPUs, transfer, comparison."""

    def __init__(
        self,
        policy: WeightSource,
        receivers: Sequence[WeightReceiver],
        transfer: WeightTransfer,
        *,
        probe_ids: IntArray,
        tolerance: float,
    ) -> None:
        """Take `tolerance`, the largest mean absolute log-prob difference, 1e-3 in float32."""
        if len(probe_ids) < 2:
            raise ValueError(f"the probe needs at least two tokens, got {len(probe_ids)}")
        self._policy = policy
        self._receivers = tuple(receivers)
        self._probe_ids = np.asarray(probe_ids, dtype=np.int32)
        self._tolerance = tolerance
        self._transfer = transfer

    async def verify(self, *, version: int) -> None:
        """Publish perturbed weights, compare, then publish the policy's own.

        Raises WeightSyncError for an engine that keeps stale weights or loads others than were sent, and
        where perturbing moves nothing. The policy ends as it was, bit for bit, unless it has ended.
        """
        before = await self._policy.probe(self._probe_ids)
        for index in range(await self._policy.num_perturbations()):
            await self._policy.perturb(index)
            try:
                await self._publish_perturbed(before, version=version)
                await self._sleep()  # room for the policy, which may have left
            except BaseException:  # after which the policy may have ended, or have no room
                async with AsyncExitStack() as stack:
                    close_quietly(stack, partial(self._policy.perturb, index, undo=True))
                raise
            await self._policy.perturb(index, undo=True)
        await self.publish(version=version)

    async def _publish_perturbed(self, before: FloatArray, *, version: int) -> None:
        shift = distance(before, await self._policy.probe(self._probe_ids))
        if shift == 0:
            raise WeightSyncError(
                "perturbing the policy's weights moves no log-prob of the probe sequence, so the check "
                "cannot tell new weights from stale ones; look at the weights of "
                "actor_rollout_ref.model.path (an output layer of zeros makes all tokens equally likely)"
            )
        await self._publish(version, tolerance=perturbed_tolerance(shift, tolerance=self._tolerance))

    async def publish(self, *, version: int) -> float:
        """Send the policy's weights to every engine; return the largest difference over the engines.

        Raises WeightSyncError if an engine scores the probe differently.
        """
        return await self._publish(version, tolerance=self._tolerance)

    async def _publish(self, version: int, *, tolerance: float) -> float:
        # The policy leaves before the caches of the engines come back: both need most of a GPU.
        await self._sleep()
        await self._wake(EnginePart.WEIGHTS)
        await self._transfer.send(version)
        expected = await self._policy.probe(self._probe_ids)
        await self._policy.release()
        await self._wake(EnginePart.CACHE)
        scores = await asyncio.gather(*(receiver.score(self._probe_ids) for receiver in self._receivers))
        differences = [
            _compare(i, expected, score, version, tolerance=tolerance) for i, score in enumerate(scores)
        ]
        return max(differences, default=0.0)

    async def _sleep(self) -> None:
        await asyncio.gather(*(receiver.sleep() for receiver in self._receivers))

    async def _wake(self, part: EnginePart) -> None:
        await asyncio.gather(*(receiver.wake(part) for receiver in self._receivers))


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


def perturbed_tolerance(shift: float, *, tolerance: float) -> float:
    """Return what `verify` accepts where perturbing moves the probe by `shift`.

    `tolerance`: what is accepted without. Perturbed weights multiply rounding, but that stays far below the
    effect of a stale matrix. Never less than without, so that a model in which rounding does more can be
    given a larger tolerance, and never near the effect of weights that are all stale.
    """
    return min(_PERTURBED * tolerance, max(shift * _STALE_SHARE, tolerance), shift / 3)


def _compare(
    engine: int, expected: FloatArray, score: FloatArray, version: int, *, tolerance: float
) -> float:
    """Return the difference between two scores of the probe. Raises WeightSyncError if it is too large."""
    if len(score) != len(expected):
        raise WeightSyncError(f"engine {engine} scored {len(score)} of {len(expected)} probe tokens")
    difference = distance(expected, score)
    if difference < tolerance:  # False for NaN
        return difference
    raise WeightSyncError(
        f"engine {engine} does not sample from the policy that is trained: after publishing version "
        f"{version} its log-probs of the probe sequence differ by {difference:.3g} on average, at most "
        f"{tolerance:.3g} is normal. Likely causes: a version of vLLM that keeps stale weights of this "
        "model when it reloads them in place (install that of requirements/*.lock), tied embeddings reloaded "
        "on the CPU (start the engine from the folder of prepare_engine_model), another precision in the "
        "engine than in the trainer (actor_rollout_ref.model.dtype), an engine that was started from another "
        "model, or a model in which rounding does more (raise "
        "actor_rollout_ref.rollout.max_log_prob_difference)"
    )


def distance(one: FloatArray, other: FloatArray) -> float:
    """Return the mean absolute difference of two scores after position 0, which has no log-prob."""
    return float(np.abs(one[1:] - other[1:]).mean())

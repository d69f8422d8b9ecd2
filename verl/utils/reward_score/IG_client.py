"""The trainer's client of the information-gain service: results in order, never a number for a failure."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from verl.errors import ServiceError
from verl.utils.http import JsonService

_NAME = "IG service"
_START = "start it with: bash IG_service_launch.sh"
_POLL_S = 0.5
_CHUNKS_IN_FLIGHT = 2
"""One that the service works on and one that waits there, so that it is never idle.

More would spend their timeouts in the service's queue, behind chunks of the same client.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRequest:
    """One gain to measure."""

    question: str
    context: str
    """All passages that were found, as one text."""
    golds: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GainResult:
    """A gain, or why there is none; exactly one of the two is None."""

    gain: float | None
    error: str | None


class IGClient:
    """Asks for gains in chunks, two at a time; the service batches across them."""

    def __init__(self, url: str, *, timeout_s: float, batch_size: int = 256) -> None:
        """`timeout_s` covers a chunk with all its attempts, counted from when it is sent.

        Raises ConfigError for a bad URL or timeout.
        """
        self._url = url.rstrip("/")
        self._batch_size = batch_size
        self._in_flight = asyncio.Semaphore(_CHUNKS_IN_FLIGHT)
        self._service = JsonService(self._url, name=_NAME, timeout_s=timeout_s, fix=_START)
        # One short attempt per look: `wait_ready` has its own deadline.
        self._probe = JsonService(self._url, name=_NAME, timeout_s=5, fix=_START)

    async def compute(self, requests: Sequence[GainRequest]) -> list[GainResult]:
        """One result per request, in order; a failed chunk becomes a named error of each of its requests."""
        chunks = [
            requests[start : start + self._batch_size] for start in range(0, len(requests), self._batch_size)
        ]
        answers = await asyncio.gather(*(self._compute_chunk(chunk) for chunk in chunks))
        return [result for results in answers for result in results]

    async def wait_ready(self, deadline_s: float) -> dict[str, object]:
        """The service's health as soon as it can work. Raises ServiceError that names what to start."""
        end = time.monotonic() + deadline_s
        while True:
            state = await self._state(end - time.monotonic())
            if isinstance(state, dict):
                return state
            if time.monotonic() + _POLL_S >= end:
                raise ServiceError(
                    _NAME, f"{self._url} was not ready within {deadline_s:g} s ({state}); {_START}"
                )
            await asyncio.sleep(_POLL_S)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._service.aclose()
        await self._probe.aclose()

    async def _state(self, patience_s: float) -> dict[str, object] | str:
        """What /health says when it is healthy, else why not."""
        try:
            async with asyncio.timeout(max(0.1, patience_s)):
                health = await self._probe.get("/health")
        except ServiceError as error:
            return str(error)
        except TimeoutError:
            return "no answer to /health"
        if health.get("status") == "healthy":
            return health
        return str(health.get("message") or health)

    async def _compute_chunk(self, chunk: Sequence[GainRequest]) -> list[GainResult]:
        payload = {
            "items": [
                {"question": request.question, "context": request.context, "answers": list(request.golds)}
                for request in chunk
            ],
            "include_details": False,
        }
        try:
            async with self._in_flight:
                body = await self._service.post("/compute_info_gain", payload)
            return _read_results(body, expected=len(chunk))
        except ServiceError as error:
            return [GainResult(gain=None, error=str(error))] * len(chunk)


def _read_results(body: dict[str, object], *, expected: int) -> list[GainResult]:
    """Results of one answer. Raises ServiceError when it does not fit its request."""
    scores, errors = body.get("scores"), body.get("errors")
    if not isinstance(scores, list) or not isinstance(errors, list):
        raise ServiceError(
            _NAME, f"the answer must hold lists scores and errors, got the keys {sorted(body)}"
        )
    if len(scores) != expected or len(errors) != expected:
        raise ServiceError(
            _NAME, f"asked for {expected} scores, got {len(scores)} scores and {len(errors)} errors"
        )
    return [_read_result(score, error) for score, error in zip(scores, errors, strict=True)]


def _read_result(score: object, error: object) -> GainResult:
    if error is not None:
        return GainResult(gain=None, error=f"{_NAME}: {error}")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return GainResult(gain=None, error=f"{_NAME}: a finite score was expected, got {score!r}")
    return GainResult(gain=float(score), error=None)

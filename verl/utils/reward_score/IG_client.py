"""Clients of the information-gain service: `GainClient` for the trainer, `IGClient` as published.

`get_ig_client`, `is_ig_service_available` and `IGClient` keep the names and signatures of InfoReasoner for
scripts that import them. One thing differs: a gain that could not be measured is None, not 0.0.

    client = get_ig_client("http://127.0.0.1:8310")
    gains = client.compute_info_gain_batch([{"question": q, "context": passages, "answers": ["Bolton"]}])
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import numpy as np

from IG.client import IGClient as _IGClient
from IG.client import SyncIGClient
from IG.messages import GainRequest, GainResult
from serving.questions import parse_golds
from verl.errors import ServiceError
from verl.utils.http import translated_calls, translated_settings

__all__ = ["GainClient", "IGClient", "get_ig_client", "is_ig_service_available"]

logger = logging.getLogger(__name__)

_DEFAULT_URL = "http://127.0.0.1:8310"
_HEALTH_TIMEOUT_S = 2.0


class GainClient:
    """Client of the trainer: asks for gains many at once or one by one, and for entailment.

    Failures of gains are named in their results, those of entailment in the log.
    """

    def __init__(
        self, url: str, *, timeout_s: float, batch_size: int = 256, token: str | None = None
    ) -> None:
        """Take `timeout_s`, from a call to its last result. Raises ConfigError for a bad setting."""
        self.timeout_s = timeout_s
        """The longest time that a step may wait for its gains."""
        self._taken: Mapping[str, int] = {}
        with translated_settings():
            self._client = _IGClient(url, timeout_s=timeout_s, batch_size=batch_size, token=token)

    def take_work(self) -> Mapping[str, int]:
        """Return the counts of the work that the service has reported for this client since the last call."""
        before, self._taken = self._taken, dict(self._client.work)
        return {name: count - before.get(name, 0) for name, count in self._taken.items()}

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        """Return one result per request, in order."""
        return await self._client.compute(requests, timeout_s=timeout_s)

    async def submit(self, request: GainRequest) -> GainResult:
        """Return the result of one request, which is sent together with others submitted meanwhile."""
        return await self._client.submit(request)

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return P(premise entails hypothesis) of each pair (premise, hypothesis); None where it failed."""
        results = await self._client.judge(pairs)
        errors = [result.error for result in results if result.error is not None]
        if errors:
            logger.warning("%d of %d pairs were not judged: %s", len(errors), len(results), errors[0])
        return [result.probability for result in results]

    async def wait_ready(self, timeout_s: float, *, judges: bool = False) -> dict[str, object]:
        """Wait until the service can work; return its health. Raises ServiceError, naming what to start.

        `judges` also requires that it judges entailment, which a published service does not.
        """
        with translated_calls():
            health = await self._client.wait_ready(timeout_s)
            if judges:
                await self._client.require_entailment()
            return health

    async def describe(self) -> dict[str, object] | None:
        """Return what the service's numbers depend on, None from a service that does not report it."""
        with translated_calls():
            return await self._client.describe()

    async def aclose(self) -> None:
        """Stop what is under way and close all connections."""
        await self._client.aclose()


class IGClient:
    """The published client: plain calls, usable with and without a running event loop."""

    def __init__(
        self,
        service_url: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 3,
        retry_delay: float = 1.0,
    ) -> None:
        """Use `service_url`, else the variable IG_SERVICE_URL; the token is the variable IG_TOKEN.

        `timeout` (seconds) covers a call with all its retries: the other two have no effect.
        """
        self.service_url = (service_url or os.environ.get("IG_SERVICE_URL") or _DEFAULT_URL).rstrip("/")
        self.timeout = timeout
        self.max_retries = max_retries
        self.retry_delay = retry_delay

    def health_check(self) -> bool:
        """Return whether the service can measure gains now."""
        try:
            with self._connect() as client, translated_calls():
                client.wait_ready(min(self.timeout, _HEALTH_TIMEOUT_S))
        except ServiceError:
            return False
        return True

    def compute_info_gain(self, question: str, context: str, answers: object) -> float | None:
        """Return the gain of one item, as `compute_info_gain_batch` does."""
        return self.compute_info_gain_batch([{"question": question, "context": context, "answers": answers}])[
            0
        ]

    def compute_info_gain_batch(self, items: Sequence[Mapping[str, object]]) -> list[float | None]:
        """Return the gains of items with `question`, `context` (empty if left out) and `answers`, in order.

        `answers` is a text, a number, an array or a list of these. None stands for an item that could not be
        measured, and the reason is logged. Raises RuntimeError if that is so for all of them.
        """
        requests = [
            GainRequest(
                question=str(item["question"]),
                context=str(item.get("context", "")),
                golds=parse_golds(list(_flatten(item["answers"]))),
            )
            for item in items
        ]
        if not requests:
            return []
        with self._connect() as client:
            results = client.compute(requests)
        errors = [result.error for result in results if result.error is not None]
        if len(errors) == len(results):
            raise RuntimeError(f"no gain could be measured by {self.service_url}: {errors[0]}")
        if errors:
            logger.warning("%d of %d gains were not measured: %s", len(errors), len(results), errors[0])
        return [result.gain for result in results]

    def _connect(self) -> SyncIGClient:
        with translated_settings():
            token = os.environ.get("IG_TOKEN") or None
            return SyncIGClient(self.service_url, timeout_s=self.timeout, token=token)


def get_ig_client(service_url: str | None = None) -> IGClient | None:
    """Return the one client of a URL, by default of the variable IG_SERVICE_URL; None without a URL."""
    url = service_url or os.environ.get("IG_SERVICE_URL")
    return _client_of(url.rstrip("/")) if url else None


def is_ig_service_available() -> bool:
    """Return whether the service that IG_SERVICE_URL names can measure gains now."""
    client = get_ig_client()
    return client is not None and client.health_check()


@cache
def _client_of(url: str) -> IGClient:
    return IGClient(url)


def _flatten(answers: object) -> Iterator[object]:
    """Yield the members of nested lists and arrays; NumPy numbers as Python's."""
    if isinstance(answers, list | tuple | np.ndarray):
        for member in answers:
            yield from _flatten(member)
    else:
        yield answers.item() if isinstance(answers, np.generic) else answers

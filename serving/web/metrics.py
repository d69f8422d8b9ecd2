"""Count the requests of a service, and write `GET /metrics`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE: str = CONTENT_TYPE_LATEST
CALLER_LEFT = 499
"""The status that is counted if the caller hung up."""


class RequestMetrics:
    """Counts requests for work by status, and measures their seconds."""

    def __init__(
        self, registry: CollectorRegistry, *, prefix: str, purpose: str, buckets: Sequence[float]
    ) -> None:
        """`purpose` of the requests, for the help texts of the metrics; `buckets` in seconds."""
        self._requests = Counter(
            f"{prefix}_requests", f"Requests for {purpose}, by HTTP status.", ["status"], registry=registry
        )
        self._seconds = Histogram(
            f"{prefix}_request_seconds",
            f"Seconds from the first byte of a request for {purpose} to the last byte of its answer.",
            buckets=buckets,
            registry=registry,
        )

    def count(self, *, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)


class CountRequests:
    """Counts the requests to one path, also refused ones, by status and time."""

    def __init__(self, app: ASGIApp, *, metrics: RequestMetrics, path: str) -> None:
        self._app = app
        self._metrics = metrics
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = CALLER_LEFT

        async def send_watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        finally:
            self._metrics.count(status=status, seconds=time.monotonic() - started)


def render_metrics(registry: CollectorRegistry) -> bytes:
    """Return all metrics in the text format of Prometheus."""
    rendered: bytes = generate_latest(registry)
    return rendered

"""Count the requests of a service."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

CLIENT_DISCONNECTED = 499
"""The status that is counted if the client disconnected."""


class RequestMetrics:
    """Counts requests for work by status, and measures their seconds."""

    def __init__(
        self, registry: CollectorRegistry, *, prefix: str, purpose: str, buckets: Sequence[float]
    ) -> None:
        """Take the `purpose` of the requests, for the help texts of the metrics, and `buckets` in seconds."""
        self.registry = registry
        """Everything that `GET /metrics` shows."""
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

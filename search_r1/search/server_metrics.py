"""The retriever's metrics, in a registry of their own, for `GET /metrics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from search_r1.search.batching import Source
from search_r1.search.retriever import FailureKind, Outcome, SearchFailure
from serving.web.metrics import RequestMetrics

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class RetrieverMetrics:
    """Counters of one server; they start at 0 with it."""

    def __init__(self, *, in_progress: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Read `in_progress`, queries without an answer, and `waiting`, those without a search yet."""
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(
            self.registry, prefix="retriever", purpose="passages", buckets=_SECONDS
        )
        self._queries = Counter(
            "retriever_queries",
            "Queries, by the source of their answer.",
            ["source"],
            registry=self.registry,
        )
        self._failures = Counter(
            "retriever_failures", "Queries without an answer, by kind.", ["kind"], registry=self.registry
        )
        for source in Source:  # so that all are there, at 0, from the start
            self._queries.labels(source)
        for kind in FailureKind:
            self._failures.labels(kind)
        self._batch_queries = Histogram(
            "retriever_batch_queries", "Queries of one search.", buckets=_SIZES, registry=self.registry
        )
        self._batch_seconds = Histogram(
            "retriever_batch_seconds", "Seconds of one search.", buckets=_SECONDS, registry=self.registry
        )
        self._gauge("retriever_queries_in_progress", "Queries accepted and not answered yet.", in_progress)
        self._gauge("retriever_queries_waiting", "Queries that wait for their search.", waiting)

    def count_query(self, source: Source) -> None:
        """Count one query."""
        self._queries.labels(source).inc()

    def count_batch(self, *, size: int, seconds: float) -> None:
        """Count one finished search."""
        self._batch_queries.observe(size)
        self._batch_seconds.observe(seconds)

    def count_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Count the failed queries of one request."""
        for outcome in outcomes:
            if isinstance(outcome, SearchFailure):
                self._failures.labels(outcome.kind).inc()

    def _gauge(self, name: str, meaning: str, read: Callable[[], int]) -> None:
        Gauge(name, meaning, registry=self.registry).set_function(read)

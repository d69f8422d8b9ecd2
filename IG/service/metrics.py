"""The counters of `GET /metrics`, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from IG.estimator import GainEstimate, GainFailure
from IG.service.backend import Backend
from IG.service.pool import PoolStatus
from IG.sharing import Work
from serving.web.metrics import RequestMetrics

_NO_WORKERS = PoolStatus(devices=(), num_ready=0, num_restarts=0, failure=None)
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class ServiceMetrics:
    """Counters of one service, from 0 at its start."""

    def __init__(
        self, *, items_in_progress: Callable[[], int], backend: Callable[[], Backend | None]
    ) -> None:
        self._registry = CollectorRegistry()
        self.requests = RequestMetrics(self._registry, prefix="ig", purpose="work", buckets=_SECONDS)
        self._items = self._counter(
            "ig_items", "Items and single pairs, by outcome: scored or a kind of failure.", "outcome"
        )
        self._prompts = self._counter("ig_prompts", "Conditions, by source of their samples.", "source")
        self._baselines = self._counter("ig_baselines", "Conditions without context, by source.", "source")
        self._answers = self._counter("ig_answers", "Sampled answers: written or empty.", "text")
        self._pairs = self._counter("ig_pairs", "Entailment pairs, by how they were settled.", "source")
        self.count_outcomes([], work=Work())  # creates every label at 0
        in_progress = Gauge(
            "ig_items_in_progress", "Items accepted and not answered yet.", registry=self._registry
        )
        in_progress.set_function(items_in_progress)
        self._registry.register(_Workers(backend))

    def count_outcomes(self, outcomes: Sequence[GainEstimate | float | GainFailure], *, work: Work) -> None:
        """Count the items, or pairs, of one request and the work that was done for them."""
        for outcome in outcomes:
            self._items.labels(outcome.kind if isinstance(outcome, GainFailure) else "scored").inc()
        for source, count in (
            ("sampled", work.prompts_sampled),
            ("joined", work.prompts_joined),
            ("cached", work.prompts_cached),
        ):
            self._prompts.labels(source).inc(count)
        self._baselines.labels("sampled").inc(work.baselines_sampled)
        self._baselines.labels("shared").inc(work.baselines - work.baselines_sampled)
        self._answers.labels("written").inc(work.answers_sampled - work.answers_empty)
        self._answers.labels("empty").inc(work.answers_empty)
        for source, count in (
            ("judged", work.pairs_judged),
            ("shared", work.pairs_shared),
            ("equal", work.pairs_equal),
        ):
            self._pairs.labels(source).inc(count)

    def _counter(self, name: str, meaning: str, label: str) -> Counter:
        return Counter(name, meaning, [label], registry=self._registry)


class _Workers(Collector):
    """Reads the state of the workers when the metrics are collected."""

    def __init__(self, backend: Callable[[], Backend | None]) -> None:
        self._backend = backend

    def collect(self) -> Iterable[Metric]:
        backend = self._backend()
        status = _NO_WORKERS if backend is None else backend.workers
        workers = GaugeMetricFamily("ig_workers", "Workers, by state.", labels=["state"])
        workers.add_metric(["ready"], status.num_ready)
        workers.add_metric(["unavailable"], len(status.devices) - status.num_ready)
        yield workers
        yield CounterMetricFamily(
            "ig_worker_restarts", "Workers that were lost and replaced.", value=status.num_restarts
        )

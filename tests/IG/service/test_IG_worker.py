from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import pytest

from IG.config import resolve_config
from IG.entailment import DeviceLostError
from IG.sampler import EngineLostError, SampledAnswer, SamplingError
from IG.service.IG_worker import LocalWorker, keep_from_collector
from IG.service.jobs import WorkerLostError


class Models:
    """Both models at once: they succeed or fail."""

    def __init__(
        self, failure: Exception | None = None, *, log_prob: float = -1.0, probability: float = 0.5
    ) -> None:
        self.failure = failure
        self.log_prob = log_prob
        self.probability = probability
        self.is_closed = False

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        if self.failure is not None:
            raise self.failure
        return (SampledAnswer(text="Paris", mean_log_prob=self.log_prob, num_tokens=1),)

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        if self.failure is not None:
            raise self.failure
        return np.full(len(pairs), self.probability)

    async def aclose(self) -> None:
        self.is_closed = True


def worker(models: Models) -> LocalWorker:
    return LocalWorker(models, entailment=models, device="cuda:0")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (EngineLostError("the engine died"), WorkerLostError),
        (DeviceLostError("the GPU is gone"), WorkerLostError),
        (SamplingError("too long"), SamplingError),
        (ValueError("no text"), ValueError),
    ],
)
async def test_a_worker_is_lost_with_its_engine_or_its_device_and_by_nothing_else(
    failure: Exception, expected: type[Exception]
) -> None:
    broken = worker(Models(failure))
    samples = isinstance(failure, EngineLostError | SamplingError)
    work = broken.sample("prompt") if samples else broken.judge([("a", "b")])
    with pytest.raises(expected, match=str(failure)):
        await work
    await broken.aclose()


async def test_a_closed_worker_is_lost() -> None:
    models = Models()
    closed = worker(models)
    assert await closed.judge([("a", "b")] * 2) == [0.5, 0.5]
    await closed.aclose()
    assert models.is_closed
    with pytest.raises(WorkerLostError, match="was closed"):
        await closed.judge([("a", "b")])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (Models(log_prob=float("nan")), r"with the generator: the log-probs of the answers are \[nan\]"),
        (Models(probability=float("nan")), "with the entailment model: the entailment model gave nan"),
        (Models(SamplingError("the prompt has 9 tokens")), "with the generator: the prompt has 9 tokens"),
    ],
)
async def test_a_worker_whose_models_cannot_measure_a_gain_does_not_start(
    models: Models, message: str
) -> None:
    config = resolve_config([], environ={})
    working, broken = worker(Models()), worker(models)
    await working.warm_up(config)
    with pytest.raises(RuntimeError, match=message):
        await broken.warm_up(config)
    await working.aclose()
    await broken.aclose()


def test_the_collector_does_not_look_through_what_is_loaded() -> None:
    loaded = [Models()]
    assert any(found is loaded for found in gc.get_objects())
    keep_from_collector()
    assert not any(found is loaded for found in gc.get_objects())

from __future__ import annotations

from collections.abc import Sequence

import pytest

from IG.belief import BeliefReader
from IG.entailment import EntailmentQueue
from IG.estimator import GainEstimator, GainOptions
from IG.sampler import SamplingError
from IG.semantics import ScoreKind
from IG.service.IG_worker import LocalBackend
from tests.fakes import FakeAnswerSampler, FakeEntailment


def backend(answers: Sequence[str] | Exception, entailment: FakeEntailment) -> LocalBackend:
    queue = EntailmentQueue(entailment)
    sampler = FakeAnswerSampler({"capital": answers})
    reader = BeliefReader(queue, score=ScoreKind.hard, threshold=0.5)
    estimator = GainEstimator(sampler, reader=reader, options=GainOptions())
    return LocalBackend(estimator, sampler=sampler, queue=queue, device="cpu")  # type: ignore[arg-type]


async def test_warming_up_uses_both_models() -> None:
    entailment = FakeEntailment()
    await backend(["Paris"], entailment)._warm_up()
    assert entailment.batches


async def test_models_that_cannot_measure_a_gain_are_not_ready() -> None:
    broken = backend(SamplingError("the prompt has 30 tokens, the model takes 20"), FakeEntailment())
    with pytest.raises(RuntimeError, match="first gain could not be measured: the prompt has 30 tokens"):
        await broken._warm_up()

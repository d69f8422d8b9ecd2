from __future__ import annotations

import pytest

from IG.belief import Belief, BeliefReader
from IG.prompts import entailment_text
from IG.sampler import SampledAnswer
from IG.semantics import ScoreKind
from IG.sharing import JudgementError, SharedJudgements, Source, Work
from tests.fakes import FakeEntailment, FakePairJudge

QUESTION = "Where was Alice born?"


def answers(texts: list[str], mean_log_probs: list[float] | None = None) -> tuple[SampledAnswer, ...]:
    likely = mean_log_probs or [-1.0] * len(texts)
    return tuple(
        SampledAnswer(text=text, mean_log_prob=value, num_tokens=1)
        for text, value in zip(texts, likely, strict=True)
    )


def both_ways(*links: tuple[str, str]) -> dict[tuple[str, str], float]:
    texts = [(entailment_text(QUESTION, one), entailment_text(QUESTION, other)) for one, other in links]
    return {pair: 0.8 for text in texts for pair in (text, text[::-1])}


async def read(
    model: FakeEntailment,
    sampled: tuple[SampledAnswer, ...],
    *,
    golds: list[str],
    full: bool,
    score: ScoreKind = ScoreKind.hard,
    work: Work | None = None,
) -> Belief:
    judgements = SharedJudgements(FakePairJudge(model), size=1000)
    return await BeliefReader(judgements, score=score, threshold=0.5).read(
        sampled, question=QUESTION, golds=golds, full=full, source=Source.sampled, work=work or Work()
    )


@pytest.mark.parametrize("full", [True, False])
async def test_an_answer_that_is_a_gold_is_read_as_the_gold_is_spelled(full: bool) -> None:
    """A model may find other things of another spelling; the score must not depend on who asks for what."""
    model = FakeEntailment(pairs=both_ways(("Bolton, England", "bolton")))
    sampled = answers(["bolton", "Bolton, England"])
    belief = await read(model, sampled, golds=["Bolton."], full=full)
    assert belief.score == pytest.approx(0.5)
    asked = [pair for batch in model.batches for pair in batch]
    assert not any("bolton" in text for pair in asked for text in pair)


async def test_an_answer_that_is_the_gold_needs_no_model() -> None:
    model = FakeEntailment()
    belief = await read(model, answers(["Bolton", "bolton"]), golds=["Bolton."], full=False)
    assert belief.score == pytest.approx(1.0)
    assert model.batches == []


async def test_matrices_have_one_row_per_response_and_one_column_per_gold() -> None:
    model = FakeEntailment(
        pairs={
            (entailment_text(QUESTION, "Leeds"), entailment_text(QUESTION, "Kent")): 0.7,
            (entailment_text(QUESTION, "Kent"), entailment_text(QUESTION, "Leeds")): 0.2,
        }
    )
    belief = await read(model, answers(["York", "Leeds", "York"]), golds=["Hull", "Kent"], full=True)
    assert belief.full is not None
    assert belief.full.response_entails_gold.tolist() == [[0.1, 0.1], [0.1, 0.7], [0.1, 0.1]]
    assert belief.full.gold_entails_response.T.tolist() == [[0.1, 0.1], [0.1, 0.2], [0.1, 0.1]]
    assert belief.full.clusters.tolist() == [0, 1, 0]
    assert belief.score == 0.0


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("score", list(ScoreKind))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_a_probability_that_is_no_number_is_no_score(
    full: bool, score: ScoreKind, value: float
) -> None:
    """The unlucky answer must not count as one that does not mean the gold."""
    asked = (entailment_text(QUESTION, "York"), entailment_text(QUESTION, "Kent"))
    broken = FakeEntailment(pairs={asked: value, asked[::-1]: value})
    with pytest.raises(JudgementError, match=rf"gave {value} for .*(York|Kent).*expected a probability"):
        await read(broken, answers(["York", "Leeds"]), golds=["Kent"], full=full, score=score)

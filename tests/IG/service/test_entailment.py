"""`POST /entailment`: pairs of texts judged by the workers and with the limits of the gains."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from IG.config import resolve_config
from IG.estimator import MAX_CHARS, GainEstimator, GainFailure
from IG.judging import judge_pairs
from IG.sharing import JudgementError, SharedJudgements
from tests.fakes import FakeAnswerSampler, FakeEntailment, FakePairJudge
from tests.IG.service.backends import GOOD, FakeBackend, calling

Pairs = Sequence[tuple[str, str]]


@dataclass(slots=True)
class Judge:
    """Judges as `FakeEntailment`; a premise that begins with `bad` fails, one with `slow` never ends."""

    model: FakeEntailment = field(default_factory=FakeEntailment)

    async def judge(self, pairs: Pairs) -> list[float | Exception]:
        if any(premise.startswith("slow") for premise, _ in pairs):
            await asyncio.Event().wait()
        judged = self.model.probabilities(pairs).tolist()
        return [
            JudgementError("kaput") if premise.startswith("bad") else probability
            for (premise, _), probability in zip(pairs, judged, strict=True)
        ]


def backend(judge: Judge | FakePairJudge) -> FakeBackend:
    config = resolve_config(["--num-generations", "4"], environ={})
    return FakeBackend(
        estimator=GainEstimator(FakeAnswerSampler({}), judge, config=config, generator_digest="aa")
    )


def body(*pairs: tuple[str, str], **options: object) -> dict[str, object]:
    return {"pairs": [{"premise": a, "hypothesis": b} for a, b in pairs], **options}


async def test_pairs_come_back_in_order_and_those_that_fail_have_no_number() -> None:
    """Also with --compat: no published client knows this address."""
    pairs = (("in Bolton", "Bolton"), ("bad", "x"), ("Bolton", "Leeds"), (" ", "x"), ("x", "y" * 20_001))
    async with calling(backend(Judge()), "--compat") as client:
        answer = await client.post("/entailment", json=body(*pairs, compat=True))
        nothing = await client.post("/entailment", json=body())
    assert answer.json()["probabilities"] == [0.9, None, 0.1, None, None]
    assert answer.json()["errors"] == [
        None,
        "kaput",
        None,
        "the premise is empty, expected a text",
        "the hypothesis has 20001 characters, expected at most 20000",
    ]
    assert (nothing.json()["probabilities"], nothing.json()["errors"]) == ([], [])


async def test_a_pair_is_judged_once_for_all_requests_and_gains() -> None:
    judge = Judge()
    async with calling(backend(judge)) as client:
        first, second = (
            answer.json()["work"]
            for answer in await asyncio.gather(
                client.post("/entailment", json=body(("a", "b"), ("a", "b"), ("b", "a"))),
                client.post("/entailment", json=body(("a", "b"))),
            )
        )
        texts = ("Where? nothing", "Where? Bolton")  # what a gain compares: see FakeAnswerSampler
        await client.post("/entailment", json=body(texts, texts[::-1]))
        gain = await client.post("/compute_info_gain", json={"items": [GOOD], "include_details": False})
        metrics = (await client.get("/metrics")).text
    assert (first["items"], first["pairs_judged"], first["pairs_shared"]) == (3, 2, 1)
    assert (second["pairs_judged"], second["pairs_shared"]) == (0, 1)
    assert gain.json()["work"]["pairs_judged"] == 0
    asked = [pair for batch in judge.model.batches for pair in batch]
    assert sorted(asked) == sorted({*asked})
    assert 'ig_items_total{outcome="scored"} 7.0' in metrics
    assert 'ig_requests_total{status="200"} 4.0' in metrics


async def test_what_is_late_is_named_and_what_is_done_counts() -> None:
    async with calling(backend(Judge())) as client:
        answer = (await client.post("/entailment", json=body(("slow", "x"), timeout_s=0.2))).json()
    assert answer["probabilities"] == [None]
    assert answer["errors"][0].startswith("deadline: ")
    judgements = SharedJudgements(Judge(), size=100)
    done = [(f"done {number}", "x") for number in range(64)]  # judged together
    await judge_pairs(judgements, done)
    late = await judge_pairs(judgements, [*done, ("slow", "x")], timeout_s=0)
    assert late.outcomes[:64] == [0.1] * 64
    assert isinstance(late.outcomes[64], GainFailure)


async def test_the_limits_are_those_of_gains() -> None:
    async with calling(backend(Judge()), "--max-items", "2") as client:
        refused = await client.post("/entailment", json=body(*[("a", "b")] * 3))
    assert refused.status_code == 413
    assert refused.json()["detail"].startswith("the request has 3 pairs, expected at most 2")
    broken = backend(Judge())
    broken.error = RuntimeError("boom")
    async with calling(broken) as client:
        answer = (await client.post("/entailment", json=body(("a", "b")))).json()
    assert (answer["probabilities"], answer["errors"]) == ([None], ["RuntimeError: boom"])


async def test_of_a_long_premise_the_end_is_read() -> None:
    judge = Judge()
    end = "x" * (MAX_CHARS - 10) + " in Bolton"
    async with calling(backend(judge)) as client:
        await client.post("/entailment", json=body(("start " * 200_000 + end, "Bolton")))
    assert judge.model.batches == [[(end, "Bolton")]]

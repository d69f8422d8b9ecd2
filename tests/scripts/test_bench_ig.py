"""What the benchmark and the soak count and conclude; the service under them is real, its models are not."""

from __future__ import annotations

import argparse
from collections import Counter

import pytest
from bench_ig import Measured, naive_pairs, summarize
from soak_ig import Abuse
from soak_ig import summarize as summarize_soak

from bench.soak import Statistics, edges
from bench.workload import Rollout, grpo_steps
from IG.doctor.questions import AskedQuestion, Document
from tests.IG.service.backends import FakeBackend, serving

PASSAGES = "Doc 1(Title: {k}) one\nDoc 2(Title: {k}) two\nDoc 3(Title: {k}) three"
EVIDENCE = [
    AskedQuestion(
        text=f"Who is {k}?",
        golds=(f"gold {k}", f"G{k}"),
        documents=(Document(text=PASSAGES.format(k=k), role="first"),),
    )
    for k in range(40)
]
ROLLOUT = Rollout(question="Where?", context="a good passage", golds=("Bolton",))
SOAK = argparse.Namespace(seconds=1.5, clients=8, workers=1, kill_share=0.0, seed=0)


def test_a_step_has_groups_of_rollouts_of_which_some_found_the_same() -> None:
    steps = grpo_steps(EVIDENCE, num_steps=4, seed=3)
    questions = [[rollout.question for rollout in step] for step in steps]
    assert all(len(step) == 32 and len(set(asked)) == 8 for step, asked in zip(steps, questions, strict=True))
    assert len({question for asked in questions for question in asked}) == 32  # none comes twice
    distinct = sum(len({rollout.context for rollout in step}) for step in steps)
    assert 4 * 8 < distinct < 4 * 32
    lines = [line for step in steps for rollout in step for line in rollout.context.splitlines()]
    assert all(line.startswith(f"Doc {k % 3 + 1}(Title: ") for k, line in enumerate(lines))
    assert steps == grpo_steps(EVIDENCE, num_steps=4, seed=3)


def test_too_few_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="6 steps of 8 questions need 48, there are 40"):
        grpo_steps(EVIDENCE, num_steps=6, seed=0)


def test_ratios_are_over_the_same_steps() -> None:
    steps = [[ROLLOUT] * 32] * 3
    measured = Measured(
        service_s=[0.5, 1.0, 0.5],
        engine_s=[0.5, 0.5, 0.5],
        engine_tokens=300,
        latencies_s=[0.1 * (k % 10 + 1) for k in range(96)],
        baselines=24,
        pairs=96,
    )
    summary = summarize(measured, steps=steps, workers=2)
    assert summary["items_per_s"] == 48.0
    assert summary["vs_engine"] == 0.75
    assert (summary["baseline_calls"], summary["baseline_calls_naive"]) == (24, 96)
    assert naive_pairs(ROLLOUT) == 2 * (90 + 20)
    assert summary["nli_pairs_naive"] == 96 * 220
    assert 100 <= summary["p50_ms"] <= summary["p99_ms"] <= 1000


def abuse_of(url: str = "http://127.0.0.1:9", *, gain: float = 0.0) -> Abuse:
    return Abuse(url, [ROLLOUT] * 8, gains=[gain] * 8, arguments=SOAK)


def passes(statistics: Statistics, *, last: float = 100.0) -> bool:
    abuse = abuse_of()
    abuse.statistics = statistics
    return summarize_soak(abuse, restarts=0, ends=(100.0, last))["passed"] is True


@pytest.mark.parametrize("shift", [0.0, 0.1])
async def test_the_soak_passes_only_a_service_that_is_right(shift: float) -> None:
    async with serving(FakeBackend()) as client:
        answer = await client.post("/compute_info_gain", json={"items": [ROLLOUT.as_item()]})
        abuse = abuse_of(str(client.base_url), gain=answer.json()["scores"][0] + shift)
        await abuse.run(lambda *_: None)
    found = abuse.statistics
    assert passes(found, last=105.0) == (shift == 0.0), found
    assert (found.wrong if shift else found.right) > 0
    assert set(found.statuses) <= {200, 422}
    assert found.statuses[422] == found.requests["malformed"] > 0


@pytest.mark.parametrize(
    ("statistics", "last"),
    [
        (Statistics(right=9, failed=1), 100.0),
        (Statistics(right=9, broken_connections=1), 100.0),
        (Statistics(right=9, statuses=Counter({503: 1})), 100.0),
        (Statistics(right=9), 111.0),
        (Statistics(), 100.0),
    ],
)
def test_the_soak_fails_for_failures_growing_memory_and_no_work(statistics: Statistics, last: float) -> None:
    assert not passes(statistics, last=last)
    assert passes(Statistics(right=9), last=109.0)


def test_memory_is_compared_after_the_first_third() -> None:
    assert edges([1, 1, 1, 5, 5, 6, 7, 7, 8]) == (5, 7)

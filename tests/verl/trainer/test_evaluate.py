"""Answers are played, recorded and summarized; what was interrupted goes on. The engine is a fake."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.fakes import AnsweringServer, FakeAgent, Reply, make_question
from tests.scripted_run import decode
from verl.errors import TrainingHaltedError
from verl.evaluation.loss_analysis import Loss
from verl.evaluation.records import (
    METRICS_FILE,
    RESULTS_FILE,
    TRAJECTORIES_FILE,
    Key,
    ResultWriter,
    read_results,
)
from verl.trainer.config.evaluation import EvaluationConfig
from verl.trainer.config.schema import Config, RewardConfig
from verl.trainer.evaluate import play, summarize, trace_evidence
from verl.trainer.wiring import make_outcome

QUESTIONS = [
    make_question(f"{source}/test/{i}", golds=("a",)) for source in ("nq", "hotpotqa") for i in range(4)
]
UIDS = [question.uid for question in QUESTIONS]


def make_config(*, n: int = 1) -> Config:
    return Config(
        reward=RewardConfig(outcome="em"),
        evaluation=EvaluationConfig(n=n, temperature=0.0 if n == 1 else 1.0, seed=5),
    )


async def evaluate(
    folder: Path, agent: FakeAgent, config: Config, *, max_concurrent: int = 512
) -> dict[str, object]:
    writer = ResultWriter(folder, decode=decode)
    try:
        outcome = make_outcome(config, decode=decode)
        await play(config, agent, QUESTIONS, max_concurrent=max_concurrent, outcome=outcome, writer=writer)
        writer.sort(keys(config.evaluation.n))
    finally:
        writer.close()
    return summarize(folder, num_asked=len(agent.asked), seconds=4.0)


def keys(n: int) -> list[Key]:
    return [(uid, sample) for uid in UIDS for sample in range(n)]


async def interrupt(folder: Path, config: Config) -> FakeAgent:
    """Evaluate until all but the slow questions are answered, then cancel, as Ctrl-C does."""
    agent = FakeAgent(delays_s=dict.fromkeys(UIDS[::2], 60.0))
    task = asyncio.create_task(evaluate(folder, agent, config))
    while len(agent.finished) < len(QUESTIONS) // 2 * config.evaluation.n:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return agent


@pytest.mark.parametrize("n", [1, 3])
async def test_an_interrupted_evaluation_goes_on_to_the_result_of_an_unbroken_one(
    tmp_path: Path, n: int
) -> None:
    config = make_config(n=n)
    unbroken, again = FakeAgent(), FakeAgent()
    await evaluate(tmp_path / "unbroken", unbroken, config)
    first = await interrupt(tmp_path / "broken", config)
    await evaluate(tmp_path / "broken", again, config, max_concurrent=2)
    assert sorted([*first.finished, *again.finished]) == sorted(UIDS * n)
    # Each question and sample has its seed, whenever and beside whatever it is asked.
    assert {*again.asked} < {*unbroken.asked}
    assert len({seed for _, _, seed, _ in unbroken.asked}) == len(keys(n))
    assert {greedy for *_, greedy in unbroken.asked} == {n == 1}
    for name in (RESULTS_FILE, TRAJECTORIES_FILE, METRICS_FILE):
        texts = [(tmp_path / folder / name).read_bytes() for folder in ("unbroken", "broken")]
        assert texts[0] == texts[1]
    assert [(r["uid"], r["sample"]) for r in read_results(tmp_path / "broken")] == keys(n)


async def test_a_failure_is_named_and_counted_and_asked_again_by_the_next_start(tmp_path: Path) -> None:
    failing = FakeAgent(failures={UIDS[0]: "search_failed: no answer"})
    summary = await evaluate(tmp_path, failing, make_config())
    assert (summary["em"], summary["questions"], summary["failed"]) == (1.0, 8.0, 1.0)
    metrics = json.loads((tmp_path / METRICS_FILE).read_text())
    assert (metrics["val/failures_search_failed"], metrics["val/failed/nq"]) == (1, 1)
    repaired = FakeAgent()
    summary = await evaluate(tmp_path, repaired, make_config())
    assert [uid for uid, *_ in repaired.asked] == [UIDS[0]]
    assert (summary["em"], summary["failed"], summary["asked"]) == (1.0, 0.0, 1)
    assert summary["seconds_per_question"] == 4.0


async def test_too_many_failures_end_it_and_what_was_answered_is_kept(tmp_path: Path) -> None:
    agent = FakeAgent(failures=dict.fromkeys(UIDS[4:], "search_failed: no answer"))
    with pytest.raises(TrainingHaltedError, match=r"2 of 8 episodes failed .* 20%\): 2 x search_failed"):
        await evaluate(tmp_path, agent, make_config(), max_concurrent=1)
    again = FakeAgent()
    await evaluate(tmp_path, again, make_config())
    assert [uid for uid, *_ in again.asked] == UIDS[4:]


@pytest.mark.parametrize(("passages", "num_queries"), [(2580, len(QUESTIONS)), (None, 0)])
async def test_queries_of_wrong_answers_are_searched_again_but_not_by_an_online_engine(
    tmp_path: Path, passages: int | None, num_queries: int
) -> None:
    config = make_config()
    await evaluate(tmp_path, FakeAgent(), config)
    hits = [{"document": {"id": "1", "contents": "T\na"}, "score": 1.0}]
    server = AnsweringServer(lambda body: Reply(json.dumps({"result": [hits for _ in body["queries"]]})))
    async with server.running():
        config.retriever.url = server.url
        services = {"retriever": {"version": {"passages": passages}}}
        await trace_evidence(config, QUESTIONS, folder=tmp_path, services=services)
    queries = [query for body in server.bodies for query in body["queries"]]
    assert len(set(queries)) == len(queries) == num_queries
    summarize(tmp_path, num_asked=0, seconds=0.0)
    metrics = json.loads((tmp_path / METRICS_FILE).read_text())
    lost = {name: count for name, count in metrics.items() if name.startswith("lost/")}
    assert lost["lost/not_retrieved"] == 0
    assert len(lost) == len(Loss)

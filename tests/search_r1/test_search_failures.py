"""A failed search from the server's answer to the advantage: named, masked, counted, and nowhere evidence."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from search_r1.search.client import HttpSearch
from tests.agents import make_agent
from tests.fakes import AnsweringServer, CharTokenizer, Reply, make_question
from tests.methods import make_method
from verl.agent.tools.search import render_context
from verl.algorithms.base import Prefetch
from verl.algorithms.scoring.outcome import Outcome
from verl.algorithms.scoring.reward import Reward
from verl.errors import TrainingHaltedError
from verl.rollout.collector import Collector
from verl.trainer.ppo.metrics import outcome_metrics, rollout_metrics
from verl.types import Completion, Finish, Group, IntArray, Sampling, Stop, Trajectory

CHARS = CharTokenizer()
SECRET = "Traceback: engine key 4711 in /srv/engine.py"
DOCUMENT = {"document": {"id": "7", "contents": '"Bolton"\nA town.'}, "score": 0.5}


class SearchThenAnswer:
    """Every other sample of a group asks for what the question names, the others for `good`."""

    def __init__(self) -> None:
        self.num_started = 0

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        text = CHARS.decode(prompt_ids.tolist())
        if "<information>" in text:
            sampled = "<answer>Bolton</answer>"
        else:
            self.num_started += 1
            sampled = f"<search>{'good' if self.num_started % 2 == 0 else text}</search>"
        ids = np.array(CHARS.encode(sampled), np.int32)
        log_probs = np.full(len(ids), -1.0, np.float32)
        return Completion(ids=ids, log_probs=log_probs, finish=Finish.STOP, version=0)


def answer_ours(body: dict[str, Any]) -> Reply:
    """`bad` queries fail, `rare` ones find nothing."""
    kinds = ["bad" if "bad" in query else "rare" if "rare" in query else "good" for query in body["queries"]]
    result = [{"bad": None, "rare": [], "good": [DOCUMENT]}[kind] for kind in kinds]
    errors = [{"kind": "unavailable", "reason": SECRET} if kind == "bad" else None for kind in kinds]
    return Reply(json.dumps({"result": result, "errors": errors}))


def answer_published(body: dict[str, Any]) -> Reply:
    """Search-R1's server: crashes on a bad query, with every query that shares its request."""
    if any("bad" in query for query in body["queries"]):
        return Reply(SECRET, 500)
    return Reply(json.dumps({"result": json.loads(answer_ours(body).body)["result"]}))


async def collect(server: AnsweringServer, *, max_failure_share: float) -> list[Group]:
    async with server.running():
        search = HttpSearch(server.url, topk=3, timeout_s=5.0)
        agent = make_agent(SearchThenAnswer(), search, tokenizer=CHARS)
        collector = Collector(agent, n=4, max_concurrent=64, max_failure_share=max_failure_share, seed=0)
        questions = [make_question(f"nq/test/{text}", text=text) for text in ("good", "rare", "bad")]
        groups = await collector.collect(questions, step=0)
        await search.aclose()
    return groups


def judge(trajectory: Trajectory) -> Outcome:
    return Outcome(value=float(trajectory.sample == 3), metrics={})


@pytest.mark.parametrize("answer", [answer_ours, answer_published])
async def test_a_failed_search_masks_its_own_episode_only(answer: Any) -> None:
    good, rare, bad = await collect(AnsweringServer(answer), max_failure_share=0.5)
    assert all(t.stop is Stop.ANSWERED for t in (*good.trajectories, *rare.trajectories))
    assert [t.stop for t in bad.trajectories] == [Stop.FAILED, Stop.ANSWERED] * 2
    everything = [t for group in (good, rare, bad) for t in group.trajectories]
    seen = "".join(CHARS.decode(t.token_ids.tolist()) + render_context(t) for t in everything)
    assert "Traceback" not in seen
    assert all(str(t.failure).startswith("search_failed: retriever: http://") for t in bad.trajectories[::2])

    # Found nothing is an observation that says so, in an episode that counts.
    shown = CHARS.decode(rare.trajectories[0].token_ids.tolist())
    assert "Nothing was found for this query." in shown
    assert rare.trajectories[0].observations[0].passages == ()
    metrics = rollout_metrics(everything)
    assert metrics["rollout/failures_search_failed"] == 2
    assert metrics["rollout/failed_share"] == pytest.approx(2 / 12)
    assert metrics["rollout/empty_search_share"] == pytest.approx(2 / 10)

    reward = Reward(judge, algorithm=make_method(), max_failure_share=0.5, fix="")
    samples = (await reward.score([bad], prefetch=Prefetch())).samples()
    assert [sample.score.outcome for sample in samples] == [None, 0.0, None, 1.0]
    scores = [sample.score for sample in samples]
    assert outcome_metrics(scores)["reward/failed_share"] == pytest.approx(2 / 4)
    assert [bool(sample.credit.advantages.any()) for sample in samples] == [False, True, False, True]


async def test_a_retriever_that_is_down_halts_the_step_and_is_named() -> None:
    server = AnsweringServer(lambda _: Reply(SECRET, 500))
    async with asyncio.timeout(200):
        with pytest.raises(TrainingHaltedError, match=r"2 x search_failed.*status 500.*repair the tool"):
            await collect(server, max_failure_share=0.1)

"""Processor time of the driver per episode: real agents in Ray actors, a scripted engine and search.

Nothing computes, so that only routing, Ray and the collector count.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from verl.protocols import Page, ToolResources
from verl.rollout.collector import Collector
from verl.rollout.host import RolloutWorker
from verl.rollout.pool import EnginePool
from verl.rollout.tokenizer import HfTokenizer
from verl.trainer.config.loading import config_class
from verl.trainer.config.schema import Config
from verl.trainer.wiring import open_agent
from verl.types import Completion, Finish, FloatArray, IntArray, Message, Passage, Question, Sampling
from verl.utils.actors import Launcher, make_launcher

EPISODES, TURNS = (64, 256, 1024), (1, 4, 8)
GROUP = 4
NUM_REPLICAS = 2
_THOUGHT = "<think> " + "I need to know more about this person. " * 6 + "</think>"
_TEXT = "It is known for its old market, which is still held there. " * 5
_ASKED = re.compile(r"after (\d+) searches")
_READ = "Doc 1(Title"
_NUM_QUERIES = 16
"""Different queries, of which the seed of a completion chooses one."""


class ScriptedEngine:
    """Searches as often as the question says, then answers, at once; half of the answers are right."""

    def __init__(self, model: str) -> None:
        self._tokenizer = HfTokenizer.from_pretrained(model)
        self._version = 0
        searches = [f"<search> market towns {k} </search>" for k in range(_NUM_QUERIES)]
        answers = [f"<answer> {name} </answer>" for name in ("Harwick", "Dovercourt")]
        self._searches, self._answers = (
            [np.array(self._tokenizer.encode(_THOUGHT + action), np.int32) for action in actions]
            for actions in (searches, answers)
        )

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        """Return the next output of the episode that the prompt shows."""
        text = self._tokenizer.decode(prompt_ids.tolist())
        asked = _ASKED.search(text)
        assert asked is not None
        choices = self._answers if text.count(_READ) >= int(asked[1]) else self._searches
        ids = choices[sampling.seed % len(choices)]
        log_probs = np.random.default_rng(sampling.seed).uniform(-2, 0, len(ids)).astype(np.float32)
        return Completion(ids=ids, log_probs=log_probs, finish=Finish.STOP, version=self._version)

    async def version(self) -> int:
        """Return the version that was published last."""
        return self._version

    async def score(self, ids: Sequence[int] | IntArray) -> FloatArray:
        """Return zeros."""
        return np.zeros(len(ids), np.float32)

    async def load_weights(self, folder: str, version: int) -> None:  # noqa: ARG002
        """Take the version alone: there are no weights."""
        self._version = version

    async def shutdown(self) -> None:
        """Do nothing."""


class ScriptedSearch:
    """Finds three passages of the same length for every query."""

    async def search(self, query: str) -> tuple[Passage, ...]:
        """Return the passages, whose titles name the query."""
        return tuple(
            Passage(id=f"{query}/{k}", title=f"Town {k} of {query}", text=_TEXT, score=0.5) for k in range(3)
        )

    async def open_page(self, *_: object, **__: object) -> Page | None:
        """Return None: there are no pages."""
        return None

    async def wait_ready(self, timeout_s: float) -> None:
        """Return at once."""

    async def describe(self) -> Mapping[str, object] | None:
        """Return None."""
        return None

    async def aclose(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the episodes of one step cost."""

    cpu_ms: float
    """Of the driver's process, per episode."""
    wall_s: float


def measure() -> dict[str, float]:
    """Return the driver's processor milliseconds per episode, and wall seconds, by episodes and turns."""
    launcher = make_launcher("ray")
    try:
        costs = asyncio.run(measure_all(launcher))
    finally:
        launcher.shutdown()
    figures = {}
    for (episodes, turns), cost in costs.items():
        name = f"{episodes}_episodes_{turns}_turns"
        figures[f"driver_ms_{name}"] = round(cost.cpu_ms, 3)
        figures[f"rollout_s_{name}"] = round(cost.wall_s, 3)
    return figures


async def measure_all(launcher: Launcher) -> dict[tuple[int, int], Cost]:
    """Measure every number of episodes and turns once, after a warm-up."""
    config = make_config()
    engines = launch(config, launcher)
    await engines.wait_until_ready()
    collector = Collector(
        engines, n=GROUP, max_concurrent=engines.max_concurrent, max_failure_share=0, seed=0
    )
    for turns in TURNS:
        await play(collector, episodes=EPISODES[0], turns=turns)
    return {
        (episodes, turns): await play(collector, episodes=episodes, turns=turns)
        for episodes in EPISODES
        for turns in TURNS
    }


def make_config() -> Config:
    """Return settings in which the longest episode has room."""
    config = config_class()()
    config.agent.format = "search_r1"
    config.max_turns = max(TURNS)
    config.data.max_start_length, config.data.max_prompt_length = 512, 16384
    config.data.max_obs_length = 512
    return config


def launch(config: Config, launcher: Launcher) -> EnginePool:
    """Start the replicas."""
    max_concurrent = max(EPISODES)
    kwargs: dict[str, object] = {
        "engine": partial(ScriptedEngine, config.actor_rollout_ref.model.path),
        "open_agent": partial(
            open_agent,
            config=config,
            resources=ToolResources(open_search=ScriptedSearch),
            temperature=1.0,
            reference="none",
        ),
    }
    actors = [
        launcher.launch(RolloutWorker, kwargs=kwargs, name=f"engine-{k}", max_concurrency=max_concurrent)
        for k in range(NUM_REPLICAS)
    ]
    return EnginePool(actors, max_concurrent=max_concurrent, request_timeout_s=120.0)


def make_questions(count: int, *, turns: int) -> list[Question]:
    """Return different questions that the scripted engine answers in so many turns."""
    texts = [f"Which town of county {k} is known after {turns - 1} searches?" for k in range(count)]
    return [
        Question(
            uid=f"scale/{turns}/{k}",
            text=text,
            messages=(Message(role="user", content=f"Answer in <answer> </answer>. Question: {text}"),),
            golds=("Harwick",),
            data_source="s",
        )
        for k, text in enumerate(texts)
    ]


async def play(collector: Collector, *, episodes: int, turns: int) -> Cost:
    """Play the episodes of one step."""
    questions = make_questions(episodes // GROUP, turns=turns)
    began, before = time.perf_counter(), time.process_time()
    groups = await collector.collect(questions, step=1)
    cpu_s, wall_s = time.process_time() - before, time.perf_counter() - began
    assert all(len(t.turns) == turns for group in groups for t in group.trajectories)
    return Cost(cpu_ms=1000 * cpu_s / episodes, wall_s=wall_s)

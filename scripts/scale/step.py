"""Processor time of the driver in a whole step, per episode: the trainer's loop around scripted models.

Real agents in Ray actors play with scripted engines, gains come over HTTP, the ranks of the policy are actors
that compute nothing: only what the trainer's own process does counts, from routing episodes to writing the
records.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from scale.driver import EPISODES, GROUP, TURNS, launch, make_config, make_questions
from verl.agent.tools.search import render_context
from verl.algorithms.base import Services
from verl.algorithms.inforeasoner import InfoReasoner, InfoReasonerConfig
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.data.sampler import QuestionSampler
from verl.rollout.collector import Collector
from verl.rollout.pool import EnginePool
from verl.rollout.tokenizer import HfTokenizer
from verl.run.progress import Progress
from verl.run.recorder import Recorder
from verl.run.tracking import Tracker
from verl.trainer.config.alarms import AlarmsConfig
from verl.trainer.config.schema import Config, TrainerConfig
from verl.trainer.plan.gpus import find_gpu
from verl.trainer.plan.setup import make_setup
from verl.trainer.plan.shape import KNOWN_SHAPES
from verl.trainer.ppo.alarms import Alarms
from verl.trainer.ppo.guard import Guard
from verl.trainer.ppo.schedule import Rollout
from verl.trainer.ppo.speed import Machine
from verl.trainer.ppo.trainer import Parts, PPOTrainer
from verl.types import FloatArray, ScoredGroups
from verl.utils.actors import Launcher, make_launcher
from verl.utils.garbage import frozen_heap
from verl.utils.reward_score.IG_client import GainClient
from verl.workers.batch import MiniBatch, TrainBatch
from verl.workers.checkpoint import CheckpointStore
from verl.workers.worker_group import WorkerGroup

STEPS = 3
"""Steps of each size, after one that fills caches."""
NUM_RANKS, MINI_BATCH_SIZE, MAX_TOKENS = 2, 32, 16_384
"""Two mini-batches or more at every size, so that each needs old log-probs."""


class ScriptedRank:
    """A rank of the policy that gets its rows and computes nothing."""

    def log_probs(self, passes: Sequence[TrainBatch], *, adapters: bool) -> list[FloatArray]:  # noqa: ARG002
        """Return a log-prob of -1 for every policy token of each pass."""
        return [np.full(of_pass.num_policy_tokens, -1, np.float32) for of_pass in passes]

    def update(self, mini_batches: Sequence[MiniBatch]) -> dict[str, float]:
        """Return what guard and alarms read."""
        return {"num_updates": float(len(mini_batches)), "skipped_updates": 0.0}


class ScriptedGains:
    """An IG service on a port of its own: every gain is 0.25, that of an empty context 0."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _GainHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def port(self) -> int:
        """Return the port."""
        return self._server.server_port


class _GainHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer a request for gains."""
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        scores = [0.25 if item["context"] else 0.0 for item in items]
        body = json.dumps({"scores": scores, "errors": [None] * len(items), "details": None}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class VersionPublisher:
    """Publishes the number of the version alone."""

    def __init__(self, engines: EnginePool) -> None:
        self._engines = engines

    async def verify(self, *, version: int) -> None:
        """Give every engine the version."""
        await self.publish(version=version)

    async def publish(self, *, version: int) -> float:
        """Give every engine the version."""
        await asyncio.gather(*(engine.load_weights("", version) for engine in self._engines.receivers))
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a step costs: processor seconds of the driver's process by part, and wall seconds."""

    episodes: float
    """Collecting episodes, and asking for their gains."""
    batch: float
    """Scores, credit, batch, dealing it and sending it to ranks."""
    records: float
    """Metrics and records."""
    wall: float

    @property
    def driver(self) -> float:
        """Return the processor seconds of all parts."""
        return self.episodes + self.batch + self.records


class MeasuredTrainer(PPOTrainer):
    """The training loop, which notes the processor seconds of its parts and saves no checkpoint."""

    sample_s = record_s = 0.0

    def __init__(self, parts: Parts, *, settings: TrainerConfig, total_steps: int) -> None:
        super().__init__(parts, settings=settings, total_steps=total_steps, progress=Progress(), identity={})
        self.costs: list[Cost] = []
        """Of each step."""

    async def sample(self, step: int) -> Rollout:
        """Run the episodes of a step; nothing else runs meanwhile."""
        before = time.process_time()
        rollout = await super().sample(step)
        self.sample_s = time.process_time() - before
        return rollout

    def record(
        self, scored: ScoredGroups, batch: TrainBatch, update: dict[str, float], rollout: Rollout
    ) -> None:
        """Write trajectories and metrics of the step."""
        before = time.process_time()
        super().record(scored, batch, update, rollout)
        self.record_s = time.process_time() - before

    async def train_step(self, step: int) -> None:
        """Run a step and note its cost."""
        before, began = time.process_time(), time.perf_counter()
        await super().train_step(step)
        cpu_s, wall_s = time.process_time() - before, time.perf_counter() - began
        rest = cpu_s - self.sample_s - self.record_s
        self.costs.append(Cost(episodes=self.sample_s, batch=rest, records=self.record_s, wall=wall_s))

    async def save(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What all sizes share."""

    engines: EnginePool
    policy: WorkerGroup
    gains: GainClient
    tokenizer: HfTokenizer
    config: Config


@asynccontextmanager
async def open_models(launcher: Launcher) -> AsyncIterator[Models]:
    """Start engines, ranks and the service for gains."""
    config = make_config()
    config.algorithm = InfoReasonerConfig()
    config.actor_rollout_ref.actor.ppo_mini_batch_size = MINI_BATCH_SIZE
    config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu = MAX_TOKENS
    engines = launch(config, launcher)
    ranks = [launcher.launch(ScriptedRank, kwargs={}, name=f"policy-{k}") for k in range(NUM_RANKS)]
    service = launcher.launch(ScriptedGains, kwargs={}, name="gains")
    port = await service.call("port")
    nowhere: Any = None  # the ranks have no group
    policy = WorkerGroup(
        ranks, config=config.actor_rollout_ref.actor, packs=True, rendezvous=nowhere, address=""
    )
    gains = GainClient(f"http://127.0.0.1:{port}", timeout_s=120.0)
    await engines.wait_until_ready()
    models = Models(
        engines=engines,
        policy=policy,
        gains=gains,
        tokenizer=HfTokenizer.from_pretrained(config.actor_rollout_ref.model.path),
        config=config,
    )
    try:
        with frozen_heap():
            yield models
    finally:
        await gains.aclose()


def make_trainer(models: Models, run_dir: Path, *, episodes: int, turns: int) -> MeasuredTrainer:
    """Return the loop over steps of so many episodes and turns."""
    config, engines = models.config, models.engines
    services = Services(render_context=render_context, ig_service=models.gains)
    method = InfoReasoner(config.algorithm, services)
    num_questions = episodes // GROUP
    publisher: Any = VersionPublisher(engines)
    parts = Parts(
        questions=QuestionSampler(
            make_questions(num_questions, turns=turns), batch_size=num_questions, seed=0
        ),
        held_out=(),
        collector=Collector(
            engines, n=GROUP, max_concurrent=engines.max_concurrent, max_failure_share=0, seed=0
        ),
        algorithm=method,
        reward=Reward(measure_outcome, algorithm=method, max_failure_share=0, fix=""),
        policy=models.policy,
        reference=models.policy,
        engines=engines,
        publisher=publisher,
        checkpoints=CheckpointStore(run_dir / "checkpoints", keep=1),
        guard=Guard(run_dir, max_skipped_updates=3),
        alarms=Alarms(AlarmsConfig(steps=STEPS + 2), max_turns=turns, max_log_prob_difference=None),
        tracker=Tracker(run_dir, TrainerConfig(logger=[])),
        recorder=Recorder(run_dir, decode=models.tokenizer.decode),
        # Of the recipe's plan, so that all speeds are computed.
        machine=Machine(setup=make_setup(config, KNOWN_SHAPES["Qwen/Qwen2.5-3B"], find_gpu("H100"))),
    )
    settings = TrainerConfig(test_freq=0, save_freq=0, val_before_train=False, val_after_train=False)
    return MeasuredTrainer(parts, settings=settings, total_steps=STEPS + 1)


async def measure_size(models: Models, *, episodes: int, turns: int) -> Cost:
    """Return what a step of this size costs, each part in the median of all steps but the first."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(models, Path(folder), episodes=episodes, turns=turns)
        await trainer.fit()
        trainer.parts.tracker.finish()
    return Cost(
        **{
            field.name: statistics.median(getattr(cost, field.name) for cost in trainer.costs[1:])
            for field in fields(Cost)
        }
    )


async def measure_all(launcher: Launcher) -> dict[tuple[int, int], Cost]:
    """Return the cost of a step by episodes and turns."""
    async with open_models(launcher) as models:
        return {
            (episodes, turns): await measure_size(models, episodes=episodes, turns=turns)
            for episodes in EPISODES
            for turns in TURNS
        }


def fit_exponents(seconds: dict[tuple[int, int], float]) -> tuple[float, float]:
    """Return p and q of `seconds ~ episodes^p * turns^q`, by least squares of the logarithms."""
    sizes = np.array([*seconds], dtype=np.float64)
    columns = np.column_stack([np.ones(len(sizes)), np.log(sizes)])
    _, p, q = np.linalg.lstsq(columns, np.log([*seconds.values()]), rcond=None)[0]
    return float(p), float(q)


def fit_turns(milliseconds: dict[int, float]) -> tuple[float, float]:
    """Return what an episode costs and what each of its turns adds, by least squares over turns."""
    turns = np.array([*milliseconds], dtype=np.float64)
    columns = np.column_stack([np.ones(len(turns)), turns])
    a, b = np.linalg.lstsq(columns, np.array([*milliseconds.values()]), rcond=None)[0]
    return float(a), float(b)


def measure() -> dict[str, float]:
    """Return processor milliseconds per episode and wall seconds of a step by its size, and how they grow."""
    launcher = make_launcher("ray")
    try:
        costs = asyncio.run(measure_all(launcher))
    finally:
        launcher.shutdown()
    figures = {}
    for (episodes, turns), cost in costs.items():
        name = f"{episodes}_episodes_{turns}_turns"
        figures[f"step_ms_{name}"] = round(1000 * cost.driver / episodes, 3)
        figures[f"step_s_{name}"] = round(cost.wall, 3)
    p, q = fit_exponents({size: cost.driver for size, cost in costs.items()})
    figures |= {"exponent_of_episodes": round(p, 3), "exponent_of_turns": round(q, 3)}
    largest = max(EPISODES)
    for part in ("episodes", "batch", "records"):
        of_part = {turns: 1000 * getattr(costs[largest, turns], part) / largest for turns in TURNS}
        base, per_turn = fit_turns(of_part)
        figures |= {f"{part}_ms": round(base, 3), f"{part}_ms_per_turn": round(per_turn, 3)}
    return figures

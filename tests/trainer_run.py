"""A trainer of real parts around fake models, for tests of the loop and of what a step trains on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from serving.files import FileRecord
from tests.agents import make_agent
from tests.fakes import CharTokenizer, FakeAgent, ScriptedSearch, make_question, make_trajectory
from tests.methods import make_method
from verl.agent.loop import ToolAgent
from verl.algorithms.base import Algorithm
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.data.sampler import QuestionSampler
from verl.protocols import Agent
from verl.rollout.collector import Collector
from verl.run.progress import Progress
from verl.run.recorder import Recorder
from verl.run.tracking import Tracker
from verl.trainer.config.alarms import AlarmsConfig
from verl.trainer.config.schema import TrainerConfig
from verl.trainer.ppo.alarms import Alarms
from verl.trainer.ppo.guard import Guard
from verl.trainer.ppo.trainer import Parts, PPOTrainer
from verl.types import Completion, Finish, IntArray, Question, Sampling, Trajectory
from verl.workers.batch import TrainBatch
from verl.workers.checkpoint import CheckpointStore

STEPS_ALONE = {"save_freq": 0, "test_freq": 0, "val_before_train": False, "val_after_train": False}
"""Settings of a run that neither saves nor evaluates between its steps."""
QUESTIONS = [make_question(f"nq/train/{k}") for k in range(6)]
HELD_OUT = [make_question("nq/test/0")]
IDENTITY: dict[str, object] = {"trainer.seed": 0}


class FakeModels:
    """Policy, engines and publisher in one: notes what was asked of them; `hooks` run at a call."""

    def __init__(
        self, *, metrics: Mapping[str, float] | None = None, is_fresh: bool = True, update_s: float = 0.0
    ) -> None:
        """`metrics` come from every update, which takes `update_s`; `is_fresh`: it needs no old log-probs."""
        self.calls: list[str] = []
        self.version = 0
        """Of the weights that the engines have."""
        self.batches: list[TrainBatch] = []
        """Of the updates."""
        self.hooks: dict[str, Any] = {}
        self._metrics = dict(metrics or {})
        self._is_fresh = is_fresh
        self._update_s = update_s

    def note(self, call: str) -> None:
        self.calls.append(call)
        self.hooks.get(call, lambda: None)()

    def is_on_policy(self, num_trajectories: int) -> bool:
        return self._is_fresh

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        self.batches.append(batch)
        self.note(f"update of {batch.num_trajectories}")
        await asyncio.sleep(self._update_s)
        return {"num_updates": 1.0, "skipped_updates": 0.0, **self._metrics}

    async def stage(self, key: str) -> None:
        self.note("save")

    async def write(self, key: str, folder: Path, *, export: Path) -> dict[Path, FileRecord]:
        await asyncio.sleep(0)  # a step may be done meanwhile
        self.note(f"write {key}")
        folder.mkdir()
        (folder / "weights").touch()
        export.mkdir()
        return {}

    async def verify(self, *, version: int) -> None:
        self.note(f"verify {version}")

    async def publish(self, *, version: int) -> float:
        self.note(f"publish {version}")
        return 0.0

    def expect_version(self, version: int) -> None:
        self.version = version
        self.note(f"expect {version}")

    async def sleep(self) -> None:
        self.note("rest")


class FakeCopy:
    """Notes after which steps it was refreshed and saved."""

    def __init__(self, models: FakeModels) -> None:
        self._models = models

    async def refresh(self, step: int) -> None:
        self._models.note(f"refresh {step}")

    async def stage(self, key: str) -> None:
        self._models.note("save copy")

    async def write(self, key: str, checkpoint: Path) -> dict[Path, FileRecord]:
        self._models.note(f"write copy of {key}")
        return {}


class VersionedAgent:
    """Samples every episode from the weights that the engines have when it begins."""

    def __init__(self, agent: Agent, models: FakeModels) -> None:
        self._agent = agent
        self._models = models

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        version = self._models.version
        trajectory = await self._agent.run(question, sample=sample, seed=seed, greedy=greedy)
        return replace(trajectory, turns=tuple(replace(turn, version=version) for turn in trajectory.turns))


class SearchingAgent(FakeAgent):
    """Finds something in every episode; later samples take longer."""

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        await asyncio.sleep(0.03 * sample)
        return make_trajectory(question, sample=sample, queries=(f"about {sample}",), answer="Bolton")


class CyclingGenerate:
    """Each episode writes the next of the texts; one without a closing tag is cut and repeated."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._next: Iterator[str] = cycle(texts)

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        context = CharTokenizer().decode(prompt_ids.tolist())
        text = next((text for text in self._texts if text in context), None) or next(self._next)
        ids = np.array(CharTokenizer().encode(text), np.int32)
        finish = Finish.STOP if "</" in text else Finish.LENGTH
        return Completion(ids=ids, log_probs=np.full(len(ids), -1.0, np.float32), finish=finish, version=0)


def make_writer(*texts: str) -> ToolAgent:
    """Return a real agent whose episodes write these texts in turn."""
    return make_agent(CyclingGenerate(texts), ScriptedSearch(), tokenizer=CharTokenizer(), max_turns=1)


class Run:
    """A trainer whose models are fake, and what it works with."""

    def __init__(
        self,
        run_dir: Path,
        *,
        algorithm: Algorithm | None = None,
        agent: Agent | None = None,
        models: FakeModels | None = None,
        has_copy: bool = False,
        **settings: int | str,
    ) -> None:
        algorithm = algorithm or make_method()
        self.models, self.agent = models or FakeModels(), FakeAgent()
        self.sampler = QuestionSampler(QUESTIONS, batch_size=2, seed=0)
        self.checkpoints = CheckpointStore(run_dir / "checkpoints", keep=2)
        self.tracker = Tracker(run_dir, TrainerConfig(logger=[]))
        fakes: Any = self.models
        copy: Any = FakeCopy(self.models) if has_copy else None
        parts = Parts(
            questions=self.sampler,
            held_out=HELD_OUT,
            collector=Collector(
                VersionedAgent(agent or self.agent, self.models),
                n=3,
                max_concurrent=9,
                max_failure_share=0.5,
                seed=0,
            ),
            algorithm=algorithm,
            reward=Reward(measure_outcome, algorithm=algorithm, max_failure_share=0.5, fix=""),
            policy=fakes,
            reference=None,
            copy=copy,
            engines=fakes,
            publisher=fakes,
            checkpoints=self.checkpoints,
            guard=Guard(run_dir, max_skipped_updates=3),
            alarms=Alarms(AlarmsConfig(steps=1), max_turns=3, max_log_prob_difference=1e-3),
            tracker=self.tracker,
            recorder=Recorder(run_dir, decode=lambda ids: "".join(map(chr, ids))),
        )
        self.trainer = PPOTrainer(
            parts,
            settings=TrainerConfig(**settings),  # type: ignore[arg-type]
            total_steps=3,
            progress=Progress(),
            identity=IDENTITY,
        )

    def questions(self, first: int, last: int) -> set[str]:
        return {uid for uid, *_ in self.agent.asked[first:last]}

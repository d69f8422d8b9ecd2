"""The plan of a comparison: worlds, methods, tuning and stages, read from YAML and checked key by key.

A plan is a file of `scripts/comparison/plans/` or one of your own. Its runs differ in world, method, tuned
settings and seed; all have the same number of episodes per step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from verl.algorithms import ALGORITHMS
from verl.errors import ConfigError

PLANS = Path(__file__).with_name("plans")
SERVICE = "ig_service."
"""Prefix of a varied setting that is one of the IG service, not of the trainer."""
SOME_GROUPS = "failed_groups_only"
HANDICAPS = ("shuffled_outcomes", SOME_GROUPS)
"""What is broken or withheld on purpose, see `comparison.handicaps`."""

Value = bool | int | float | str | None
_FORBID = ConfigDict(extra="forbid")


@with_config(_FORBID)
@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A folder as `worlds.open_world` reads it."""

    folder: Path
    damaged_from: Path | None = None
    """The world of which this one is a copy without `share` of its supporting passages; made if needed."""
    share: float = 0.37

    @property
    def source(self) -> Path:
        """Return the folder that questions and models are from."""
        return self.damaged_from or self.folder


@with_config(_FORBID)
@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The settings that are tuned."""

    lr: float
    group: int
    """Episodes per question."""
    kl: float
    """Weight of the KL term; 0: none."""

    def __str__(self) -> str:
        return f"lr {self.lr:g}, group {self.group}, KL {self.kl:g}"


@with_config(_FORBID)
@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method with its settings."""

    algorithm: str
    settings: dict[str, Value] = field(default_factory=dict)
    """Overrides of the trainer."""
    ig_service: dict[str, Value] = field(default_factory=dict)
    """Flags of the IG service; `{world}` stands for the folder of the run's world."""
    handicap: str | None = None
    tuned_like: str | None = None
    """Name of the method whose tuned settings it takes; None: it is tuned itself."""
    control: str | None = None
    """Name of a method that is rewarded for the same outcome and without a gain, to compare with as well."""


@with_config(_FORBID)
@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A small search, the same for each method: the best trial by mean EM over the last steps."""

    world: str
    steps: int
    seed: int
    window: int
    """Last steps over which the EM of sampled episodes on training questions is averaged."""
    methods: list[str]
    trials: list[Tuned]


@with_config(_FORBID)
@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """One setting of a method over several values, drawn as a curve."""

    method: str
    setting: str
    values: list[Value]

    def names(self) -> dict[str, Value]:
        """Return the values by the names of the methods that they make."""
        short = self.setting.rpartition(".")[2]
        return {f"{self.method} {short}={write_value(value)}": value for value in self.values}


@with_config(_FORBID)
@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Methods on one world, with several seeds; each is compared with `base`."""

    world: str
    steps: int
    seeds: int
    methods: list[str] = field(default_factory=list)
    base: str | None = None
    vary: Variation | None = None
    must_differ: bool = False
    """Whether `base` must be shown to be better than every other method: a check of the world."""


@with_config(_FORBID)
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared."""

    rollouts: int
    """Episodes per step of every run."""
    evaluate_every: int
    """Steps between two greedy evaluations on the held-out questions."""
    questions: int
    """Held-out questions of an evaluation, the first ones of the world's test set."""
    untuned: Tuned
    """Where a method was not tuned."""
    worlds: dict[str, World]
    methods: dict[str, Method]
    stages: dict[str, Stage]
    tuning: Tuning | None = None
    settings: dict[str, Value] = field(default_factory=dict)
    """Overrides of the trainer for every run."""
    ig_service: dict[str, Value] = field(default_factory=dict)
    """Flags of the IG service for every run."""

    def method(self, name: str) -> Method:
        """Return a method, also one that a stage makes by varying a setting."""
        if name in self.methods:
            return self.methods[name]
        for stage in self.stages.values():
            if stage.vary is not None and name in stage.vary.names():
                return _vary(self.methods[stage.vary.method], stage.vary, stage.vary.names()[name])
        raise KeyError(name)

    def stage_methods(self, stage: Stage) -> list[str]:
        """Return the names of the methods of a stage, in order, the base first."""
        names = [*stage.methods, *(stage.vary.names() if stage.vary else ())]
        return list(dict.fromkeys(([stage.base] if stage.base else []) + names))

    def numbers(self, names: Iterable[str]) -> dict[str, int]:
        """Return numbers to draw methods by; those that differ in handicap or tuning alone share one."""
        kinds: list[object] = []
        found = {}
        for name in (*self.methods, *names):
            method = self.method(name)
            kind = (method.algorithm, method.settings, method.ig_service)
            if kind not in kinds:
                kinds.append(kind)
            found[name] = kinds.index(kind)
        return found

    def controls(self, names: Collection[str]) -> list[tuple[str, str]]:
        """Return the methods among these whose control is among them too, each with its control."""
        found = [(name, self.method(name).control) for name in names]
        return [(name, control) for name, control in found if control is not None and control in names]


_SHAPE = TypeAdapter(Plan)


def read_plan(name: str) -> Plan:
    """Return a plan by the name of a built-in one or by its file. Raises ConfigError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PLANS / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in PLANS.glob("*.yaml")))
        raise ConfigError(f"--plan {name}: expected a YAML file, or one of {known}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--plan {name}: cannot be read ({error}); expected a YAML file in UTF-8"
        ) from error
    try:
        plan = _SHAPE.validate_python(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {' '.join(str(error).split())}; repair it") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: {key}: {first['msg']}, got {first['input']!r}; correct the file"
        ) from error
    if problems := list(_check(plan)):
        raise ConfigError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return plan


def write_value(value: Value) -> str:
    """Return a value as Hydra reads it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _vary(method: Method, vary: Variation, value: Value) -> Method:
    tuned_like = method.tuned_like or vary.method
    if vary.setting.startswith(SERVICE):
        flags = method.ig_service | {vary.setting.removeprefix(SERVICE): value}
        return replace(method, ig_service=flags, tuned_like=tuned_like)
    return replace(method, settings=method.settings | {vary.setting: value}, tuned_like=tuned_like)


def _check(plan: Plan) -> Iterator[str]:
    """Yield what in the plan names nothing, or does not divide the episodes of a step into groups."""
    trials = {"untuned": [plan.untuned], "tuning.trials": plan.tuning.trials if plan.tuning else []}
    for where, group in ((where, each.group) for where, some in trials.items() for each in some):
        if group < 2 or plan.rollouts % group:
            yield f"{where}: group: {group}; expected 2 or more, a divisor of rollouts: {plan.rollouts}"
    for name, method in plan.methods.items():
        where = f"methods.{name}"
        yield from _unknown(f"{where}.algorithm", [method.algorithm], ALGORITHMS)
        yield from _unknown(f"{where}.handicap", [method.handicap] if method.handicap else [], HANDICAPS)
        yield from _unknown(f"{where}.control", [method.control] if method.control else [], plan.methods)
        # Of a method that is not tuned itself there is nothing to take.
        tuned = plan.methods if plan.tuning is None else plan.tuning.methods
        yield from _unknown(f"{where}.tuned_like", [method.tuned_like] if method.tuned_like else [], tuned)
    if plan.tuning is not None:
        yield from _check_tuning(plan, plan.tuning)
    for name, stage in plan.stages.items():
        yield from _check_stage(plan, stage, where=f"stages.{name}")


def _check_tuning(plan: Plan, tuning: Tuning) -> Iterator[str]:
    yield from _unknown("tuning.world", [tuning.world], plan.worlds)
    yield from _unknown("tuning.methods", tuning.methods, plan.methods)
    for where, some in (("tuning.methods", tuning.methods), ("tuning.trials", tuning.trials)):
        if not some:
            yield f"{where}: is empty; expected one or more, or no tuning"


def _check_stage(plan: Plan, stage: Stage, *, where: str) -> Iterator[str]:
    varied = stage.vary.names() if stage.vary else ()
    yield from _unknown(f"{where}.world", [stage.world], plan.worlds)
    yield from _unknown(f"{where}.methods", stage.methods, plan.methods)
    yield from _unknown(f"{where}.vary.method", [stage.vary.method] if stage.vary else [], plan.methods)
    yield from _unknown(f"{where}.base", [stage.base] if stage.base else [], {*plan.methods, *varied})
    if stage.seeds < 1 or stage.steps < 1:
        yield f"{where}: seeds: {stage.seeds}, steps: {stage.steps}; expected 1 or more of each"
    if stage.must_differ and stage.base is None:
        yield f"{where}.must_differ: needs a base, the method that must be better"


def _unknown(where: str, names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{where}: {name}; expected one of {', '.join(known)}"

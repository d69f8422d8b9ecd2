"""The runs of a plan, and the key of each: a hash of all that its result depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from worlds import WORLD, WorldError, describe_source, list_content, open_world, place_in_world
from worlds import World as OpenedWorld

from comparison.plan import Method, Plan, Stage, Tuned, Value, World, write_value
from serving.files import sha256_of_file
from verl.algorithms import ALGORITHMS
from verl.errors import ConfigError
from verl.trainer.config.loading import compose_config, config_class
from verl.trainer.config.overrides import check_overrides, in_quotes
from verl.trainer.config.schema import Config
from verl.trainer.needs import USE_IG_SERVICE
from verl.utils.flatten import flatten

CODE_VERSION = 2
"""Raise it with a change after which a run with the same settings gives other numbers: all runs are then
done again. A change of a default value is such a change; one of rounding alone is not. Where few runs are
concerned, remove their results instead."""
ROOT = Path(__file__).resolve().parents[2]
_KEY_DIGITS = 12
_USED_WHERE_NAMED = ("evidence",)
"""Models that count only in runs whose flags of the IG service name them."""
_WITHOUT_EFFECT = (
    # Where something is, and how long to wait for it. Files and models count by their content.
    "data.train_files", "data.val_files", "actor_rollout_ref.model.path", "retriever.url",
    "retriever.timeout_s", "reward.semantic.", "trainer.default_local_dir", "trainer.project_name",
    "trainer.experiment_name", "trainer.logger", "trainer.launcher", "trainer.save_freq",
    "trainer.max_checkpoints_to_keep", "trainer.resume_mode", "trainer.startup_timeout_s",
    "trainer.service_wait_s", "trainer.alarms.", "trainer.total_epochs", "trainer.profile_steps",
    "evaluation.", "placement.", "plan",
)  # fmt: skip
_OF_ONE_RUN = (
    "algorithm.", "reward.", "evaluation.", "placement.", "plan", "trainer.", "actor_rollout_ref.actor.",
    "actor_rollout_ref.rollout.n_agent", "data.train_", "data.val_",
)  # fmt: skip
_OF_ENGINES = (
    "trainer.device", "trainer.launcher", "trainer.num_cpu_engines", "trainer.max_concurrent_episodes",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run of a plan."""

    method_name: str
    method: Method
    world_name: str
    world: World
    tuned: Tuned
    rollouts: int
    steps: int
    seed: int
    overrides: tuple[str, ...]
    """Of the trainer, without addresses and the run folder."""
    ig_flags: Mapping[str, str]
    """Of the IG service, empty where the method does not need it."""
    settings: Mapping[str, object]
    """All that the result depends on."""

    @property
    def key(self) -> str:
        """Return the name of the result."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]

    def service_flags(self, world: OpenedWorld) -> tuple[str, ...]:
        """Return the flags of the IG service in a world; of equal ones the last counts."""
        given = {name.replace("_", "-"): value for name, value in self.ig_flags.items()}
        own = (f"--{name}={place_in_world(value, folder=world.folder)}" for name, value in given.items())
        return (*world.ig_service_flags, *own)

    def has_changed(self) -> bool:
        """Return whether files of the world are others than those that the key stands for."""
        folder = open_source(self.world).folder
        flags = {
            name: _describe.__wrapped__(value, flag=name, world=folder)
            for name, value in self.ig_flags.items()
        }
        now = {"world": digest_world.__wrapped__(self.world), "ig_service": flags}
        return any(self.settings[name] != value for name, value in now.items())

    @property
    def label(self) -> str:
        return f"{self.method_name} on {self.world_name}, {self.steps} steps, {self.tuned}, seed {self.seed}"


def make_run(
    plan: Plan,
    *,
    method_name: str,
    world_name: str,
    tuned: Tuned,
    steps: int,
    seed: int,
    evaluates: bool = True,
) -> RunSpec:
    """Return a run. Raises ConfigError for settings that the trainer refuses and missing worlds."""
    method, world = plan.method(method_name), plan.worlds[world_name]
    opened = open_source(world)
    overrides = (
        "recipe=quickstart",
        f"algorithm={method.algorithm}",
        *opened.overrides,
        f"data.val_max_questions={plan.questions}",
        f"data.train_batch_size={plan.rollouts // tuned.group}",
        f"actor_rollout_ref.rollout.n_agent={tuned.group}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={plan.rollouts}",
        f"actor_rollout_ref.actor.optim.lr={tuned.lr!r}",
        f"actor_rollout_ref.actor.use_kl_loss={write_value(tuned.kl > 0)}",
        f"actor_rollout_ref.actor.kl_loss_coef={tuned.kl!r}",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000000",
        f"trainer.test_freq={plan.evaluate_every if evaluates else 0}",
        f"trainer.val_before_train={write_value(evaluates)}",
        f"trainer.val_after_train={write_value(evaluates)}",
        "trainer.save_freq=0",
        f"trainer.seed={seed}",
        "trainer.logger=[]",
        *_write(plan.settings | method.settings),
    )
    needs_service = bool(ALGORITHMS[method.algorithm].needs & USE_IG_SERVICE)
    flags = (plan.ig_service | method.ig_service) if needs_service else {}
    ig_flags = {name: write_value(value) for name, value in flags.items()}
    # Only the seed differs between most runs, and composing a configuration takes a while.
    without_seed = tuple(item for item in overrides if not item.startswith("trainer.seed="))
    settings = {
        "code": CODE_VERSION,
        "world": digest_world(world),
        "config": _deviations(without_seed, folder=str(opened.folder)) | {"trainer.seed": seed},
        "ig_service": {
            name: _describe(value, flag=name, world=opened.folder) for name, value in ig_flags.items()
        },
        "handicap": method.handicap,
    }
    return RunSpec(
        method_name=method_name,
        method=method,
        world_name=world_name,
        world=world,
        tuned=tuned,
        rollouts=plan.rollouts,
        steps=steps,
        seed=seed,
        overrides=overrides,
        ig_flags=ig_flags,
        settings=settings,
    )


def tuning_runs(plan: Plan) -> dict[str, list[RunSpec]]:
    """Return the trials of each method that is tuned, in the order of the plan."""
    tuning = plan.tuning
    if tuning is None:
        return {}
    return {
        name: [
            make_run(
                plan,
                method_name=name,
                world_name=tuning.world,
                tuned=trial,
                steps=tuning.steps,
                seed=tuning.seed,
                evaluates=False,  # settings are chosen on training questions
            )
            for trial in tuning.trials
        ]
        for name in tuning.methods
    }


def stage_runs(plan: Plan, stage: Stage, *, chosen: Mapping[str, Tuned]) -> dict[str, list[RunSpec]]:
    """Return the runs of each method of a stage, one per seed.

    `chosen` are the best settings of methods whose tuning is done; methods that wait for theirs are left out.
    """
    runs = {}
    for name in plan.stage_methods(stage):
        tuned = tuned_settings(plan, name, chosen=chosen)
        if tuned is not None:
            runs[name] = [
                make_run(
                    plan, method_name=name, world_name=stage.world, tuned=tuned, steps=stage.steps, seed=seed
                )
                for seed in range(stage.seeds)
            ]
    return runs


def tuned_settings(plan: Plan, name: str, *, chosen: Mapping[str, Tuned]) -> Tuned | None:
    """Return the tuned settings of a method, or of the one it follows; None while they are not known."""
    source = plan.method(name).tuned_like or name
    if plan.tuning is None or source not in plan.tuning.methods:
        return plan.untuned
    return chosen.get(source)


@cache
def open_source(world: World) -> OpenedWorld:
    """Return the world that questions, models and settings are from. Raises ConfigError."""
    try:
        return open_world(world.source, policy=None, generator=None)
    except WorldError as error:
        raise ConfigError(f"worlds: the plan names one that cannot be used: {error}") from error


@cache
def digest_world(world: World) -> str:
    """Return a hash over the content of passages, questions, models and settings. Raises ConfigError.

    Models that only some methods use do not count, see `_describe`. A damaged world counts by what it is
    made of, so that it need not be there. The index is made of passages and encoder, and differs between
    machines in the last digits.
    """
    source = open_source(world).folder
    optional = [source / "models" / name for name in _USED_WHERE_NAMED]
    used = [path for path in list_content(source) if not {*optional} & {*path.parents}]
    facts = _list_hashes(used, folder=source)
    if world.damaged_from is not None:
        facts.append(f"without {world.share} of the supporting passages")
    return _digest(facts)


@cache
def _describe(value: str, *, flag: str, world: Path) -> str:
    """Return a flag's value, with a hash of what it names in the world. Raises ConfigError."""
    if WORLD not in value:
        return value
    named = Path(place_in_world(value, folder=world))
    files = _list_files(named)
    if not files:
        raise ConfigError(
            f"ig_service.{flag}={value}: {named} is missing or empty; make it (of a model: "
            f"scripts/make_world.py --stages {named.name}), or name another one in the plan"
        )
    return f"{value} {_digest(_list_hashes(files, folder=named))}"


def _list_files(path: Path) -> list[Path]:
    """Return a file, or all files below a folder."""
    return [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]


def _list_hashes(files: Iterable[Path], *, folder: Path) -> list[str]:
    return [f"{path.relative_to(folder)} {sha256_of_file(path)}" for path in sorted(files)]


def _digest(facts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:_KEY_DIGITS]


def prepare_world(world: World) -> OpenedWorld:
    """Return a world that services can be started for; a damaged one that is not there is made.

    Raises ConfigError for a damaged one with another share or from another state of its source.
    """
    source = open_source(world)
    if world.damaged_from is None:
        return source
    manifest = world.folder / "manifest.json"
    if not manifest.is_file():
        from world.hard.damage import damage  # loads what encodes passages, which takes seconds

        world.folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=world.folder.parent) as scratch:
            made = Path(scratch) / "world"
            damage(world.damaged_from, made, share=world.share, seed=0)
            try:
                made.rename(world.folder)
            except OSError:
                if not manifest.is_file():  # otherwise another comparison was faster
                    raise
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    if (found := facts.get("share")) != world.share:
        raise ConfigError(
            f"{world.folder} lacks a share of {found} of its supporting passages, the plan says "
            f"{world.share}; remove the folder, or name another one in the plan (worlds:)"
        )
    if facts.get("damaged_from") != describe_source(source.folder):
        raise ConfigError(
            f"{world.folder} was made from another state of {source.folder}, or by an earlier version; "
            "remove it, so that it is made again, or name another folder in the plan (worlds:)"
        )
    return open_world(world.folder, policy=source.policy, generator=source.generator)


@cache
def _deviations(overrides: tuple[str, ...], *, folder: str) -> dict[str, object]:
    """Return the settings that are not the default values of the schema, by key; the method always.

    New settings with a default value do not change the keys of runs that are done, nor does the folder of
    the world.
    """
    config = compose_config(check_overrides(overrides))
    plain = config_class()()
    plain.algorithm = type(config.algorithm)()
    defaults = flatten(dataclasses.asdict(plain))
    values = flatten(dataclasses.asdict(config))
    kept = {k: v for k, v in values.items() if v != defaults[k] and not k.startswith(_WITHOUT_EFFECT)}
    if not ALGORITHMS[config.algorithm.name].answer_wrapper:  # nothing is written in it
        kept.pop("reward.answer_wrapper", None)
    moved = {k: v.replace(folder, WORLD) if isinstance(v, str) else v for k, v in kept.items()}
    return moved | {"algorithm.name": config.algorithm.name}


def _write(settings: Mapping[str, Value]) -> list[str]:
    def quote(value: str) -> str:
        is_list = re.fullmatch(r"\[.*\]", value)
        return value if is_list or re.fullmatch(r"[\w.,:/+-]*", value) else in_quotes(value)

    return [
        f"{key}={quote(value) if isinstance(value, str) else write_value(value)}"
        for key, value in settings.items()
    ]


def shared_settings(config: Config) -> str:
    """Return what engines and agents of a run depend on: runs that have it in common can share them."""
    values = flatten(dataclasses.asdict(config))
    kept = {key: value for key, value in values.items() if not key.startswith(_OF_ONE_RUN)}
    kept |= {key: values[key] for key in _OF_ENGINES}
    return json.dumps(kept, sort_keys=True, default=str)

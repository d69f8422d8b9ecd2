"""Find the checkpoint that is asked, and the settings under which its run played episodes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl.agent.prompts import PACKAGED_FILE
from verl.algorithms.base import Algorithm
from verl.errors import ConfigError
from verl.run.manifest import MANIFEST_FILE, Manifest, describe_file, read_manifest
from verl.trainer.config.loading import restore_config, schema_keys
from verl.trainer.config.schema import Config, ModelConfig, TrainerConfig
from verl.workers.checkpoint import CHECKPOINTS, find_policy

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
RUNS = _ROOT / "runs"
_SHIPPED = _ROOT / ModelConfig().path
"""The policy of the embedded world, to which the data of the default configuration belongs."""
QUICKSTART_RUNS = "quickstart-*"
_LEVELS = 4
"""A model lies at most so many folders below its run: run, checkpoints, global_step_N, huggingface."""
_OF_TRAINING = frozenset({"algorithm", "reward", "trainer", "evaluation"})
"""Sections without effect on an episode; the trainer's are chosen here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model and what is known of the run that trained it."""

    model: str
    """A folder in Hugging Face's format, or a hub id."""
    run_dir: Path | None = None
    """None for a model that lies in no run folder."""
    manifest: Manifest | None = None

    @property
    def name(self) -> str:
        """Return a short name: run and step, or the last part of the path."""
        if self.run_dir is None:
            return Path(self.model).name
        return f"{self.run_dir.name}/{Path(self.model).parent.name}"

    @property
    def has_data(self) -> bool:
        """Return whether the questions of the configuration are those that the model was trained on."""
        return self.manifest is not None or Path(self.model).resolve() == _SHIPPED

    @property
    def retriever(self) -> object:
        """Return what the retriever of the run said its passages depend on; None where that is unknown."""
        services = (self.manifest or {}).get("services") or {}
        return (services.get("retriever") or {}).get("version")


def find_checkpoint(model: str | None, *, runs: Path = RUNS) -> Checkpoint:
    """Return the checkpoint at a path (of a run, a checkpoint or a model), or a model of the hub.

    Without one: the last checkpoint of the newest quickstart that has any. Raises ConfigError if there is
    none, DataError for a damaged manifest.
    """
    path = find_policy(str(_newest_quickstart(runs)) if model is None else model)
    folder = Path(path).resolve()
    for run_dir in [folder, *folder.parents][:_LEVELS]:
        if (run_dir / MANIFEST_FILE).is_file():
            return Checkpoint(model=path, run_dir=run_dir, manifest=read_manifest(run_dir))
    return Checkpoint(model=path)


def _newest_quickstart(runs: Path) -> Path:
    """Return the run folder whose name, which holds its time, comes last. Raises ConfigError."""
    found = sorted(
        path.parent for path in runs.glob(f"{QUICKSTART_RUNS}/{CHECKPOINTS}") if any(path.iterdir())
    )
    if not found:
        raise ConfigError(
            f"no quickstart with a checkpoint in {runs}; train one with 'make quickstart', or name a model "
            "with --model, such as world/models/policy"
        )
    return found[-1]


def make_config(
    checkpoint: Checkpoint, *, max_turns: int | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Return the settings of the run, else the defaults, for one engine and no training.

    `overrides` are `key=value` of the trainer's configuration. Raises ConfigError.
    """
    default = {"agent": {"format": Algorithm.format}}
    recorded: dict[str, Any] = (checkpoint.manifest or {}).get("config") or default
    _require_known(overrides)
    kept = {key: value for key, value in recorded.items() if key not in _OF_TRAINING}
    if wrapper := recorded.get("reward", {}).get("answer_wrapper"):
        kept["reward"] = {"answer_wrapper": wrapper}
    config = restore_config(kept, overrides=overrides)
    model = replace(config.actor_rollout_ref.model, path=checkpoint.model)
    rollout = config.actor_rollout_ref.rollout
    prompt_file = None if config.data.prompt_file is None else _find(config.data.prompt_file)
    _warn_of_other_file(prompt_file, (checkpoint.manifest or {}).get("prompt_file"))
    data = replace(config.data, val_files=[*map(_find, config.data.val_paths)], prompt_file=prompt_file)
    return replace(
        config,
        data=data,
        max_turns=config.max_turns if max_turns is None else max_turns,
        actor_rollout_ref=replace(
            config.actor_rollout_ref, model=model, rollout=replace(rollout, n_gpus_per_node=0)
        ),
        # In this process: starting Ray takes longer than answering.
        trainer=TrainerConfig(launcher="local", n_gpus_per_node=rollout.tensor_model_parallel_size),
    )


def _require_known(overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override that names no setting."""
    keys = set(schema_keys())
    sections = {key.rpartition(".")[0] for key in keys}
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or key.partition("[")[0] not in keys - sections:
            raise ConfigError(
                f"--set {override}: expected NAME=VALUE with a setting of "
                "verl/trainer/config/ppo_trainer.yaml, such as agent.format=tool_calls; correct the name"
            )


def _find(path: str) -> str:
    """Return a path of a configuration; if it is not in this folder, that of the repository."""
    in_repository = _ROOT / path
    return str(in_repository) if not Path(path).exists() and in_repository.exists() else path


def _warn_of_other_file(prompt_file: str | None, recorded: Mapping[str, Any] | None) -> None:
    """Warn if the fixed texts have changed since the run."""
    path = Path(prompt_file or PACKAGED_FILE)
    if recorded is not None and path.is_file() and describe_file(path)["sha256"] != recorded.get("sha256"):
        logger.warning("%s has changed since the run: answers can differ", path)

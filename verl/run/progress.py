"""The driver's part of a checkpoint: one small JSON file with what it needs to continue.

The workers save weights, optimizer and random states. The driver has no random state: every seed is derived
from that of the run (`verl/utils/seeding.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, with_config

from verl.errors import ConfigError, DataError
from verl.run.manifest import Manifest
from verl.trainer.config.schema import Config, ModelConfig
from verl.utils.files import parse_json

PROGRESS_FILE = "progress.json"
_NEW_RUN = "start another run with another trainer.experiment_name or with trainer.resume_mode=disable"
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")

Identity = dict[str, object]


@with_config(ConfigDict(extra="forbid"))
@dataclass(slots=True, kw_only=True)
class Progress:
    """The state of the driver. The trainer sets `step` after each finished step."""

    step: int = 0
    sampler: dict[str, int] = field(default_factory=dict)
    """`state_dict()` of the question sampler."""

    def save(self, folder: Path, *, identity: Identity) -> None:
        """Write the state and the run's identity to a checkpoint folder."""
        record = {"progress": asdict(self), "identity": identity}
        (folder / PROGRESS_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, identity: Identity) -> Progress:
        """Read the state. Raises ConfigError if the file is missing or damaged, or of another run."""
        path = folder / PROGRESS_FILE
        fix = f"delete {folder.name} so that an older one is resumed, or {_NEW_RUN}"
        try:
            record = parse_json(path.read_bytes(), shape=_SHAPE, where=str(path), fix=fix)
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing; {fix}") from error
        except DataError as error:
            raise ConfigError(str(error)) from error
        differences = [
            f"{key} was {saved!r}, is {identity.get(key)!r}"
            for key, saved in sorted(record.identity.items())  # older versions saved fewer keys
            if saved != identity.get(key)
        ]
        if differences:
            raise ConfigError(
                f"{folder} cannot be resumed with this configuration: " + "; ".join(differences) + ". "
                f"Fix: restore these settings and files, or {_NEW_RUN}; {folder / 'huggingface'} can be "
                "its actor_rollout_ref.model.path."
            )
        return record.progress


@dataclass(slots=True, kw_only=True)
class _Record:
    progress: Progress
    identity: Identity


_SHAPE = TypeAdapter(_Record)


def run_identity(config: Config, manifest: Manifest) -> Identity:
    """Return what a resumed run must have in common with the saved one; the rest may change.

    Training data and model are compared by content: with other questions the position in the data is
    meaningless, and with another model the KL term has another reference, which no metric would show.
    """
    model = config.actor_rollout_ref.model.path
    hashes = {facts["path"]: facts["sha256"] for facts in manifest["data"]}
    return {
        "actor_rollout_ref.model.path": f"{model} ({model_digest(manifest['model'])})",
        "data.train_files": [f"{path} ({hashes[path][:12]})" for path in config.data.train_paths],
        "data.train_batch_size": config.data.train_batch_size,
        "trainer.seed": config.trainer.seed,
        "algorithm.name": config.algorithm.name,
        "actor_rollout_ref.model.lora_rank": describe_adapters(config.actor_rollout_ref.model),
        "agent": f"{config.agent.format} with {', '.join(config.agent.tools)}",
    }


def describe_adapters(model: ModelConfig) -> str:
    """Return what the meaning of saved adapters depends on."""
    if not model.lora_rank:
        return "0"
    return f"{model.lora_rank}, lora_alpha={model.lora_alpha:g}, target_modules={model.target_modules}"


def model_digest(model: Manifest) -> str:
    """Return one hash over sizes and hashes of the files of model, tokenizer and chat template."""
    files = {n: facts for n, facts in (model["files"] or {}).items() if Path(n).suffix in _MODEL_FILES}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]

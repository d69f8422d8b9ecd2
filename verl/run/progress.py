"""Where a run stands: one small JSON file in every checkpoint folder, what the driver needs to go on.

Weights, optimizer and the workers' random states are saved by the workers; this is the driver's own part. The
driver draws nothing from global generators: every seed is derived from the run's (`verl/utils/seeding.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, with_config

from verl.errors import ConfigError, DataError
from verl.run.manifest import Manifest
from verl.trainer.config.schema import Config
from verl.utils.files import parse_json

PROGRESS_FILE = "progress.json"
_FRESH_START = "start another run with another trainer.experiment_name or with trainer.resume_mode=disable"
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")

Identity = dict[str, object]


@with_config(ConfigDict(extra="forbid"))
@dataclass(slots=True, kw_only=True)
class Progress:
    """The resumable state of the driver. The trainer sets `step` after each finished step."""

    step: int = 0
    sampler: dict[str, int] = field(default_factory=dict)
    """`state_dict()` of the question sampler."""

    def save(self, folder: Path, *, identity: Identity) -> None:
        """Write the state and the run's identity into a checkpoint folder."""
        record = {"progress": asdict(self), "identity": identity}
        (folder / PROGRESS_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, identity: Identity) -> Progress:
        """Read the state back.

        Raises ConfigError if the file is missing or damaged, or if the run is not the one that was saved.
        """
        path = folder / PROGRESS_FILE
        fix = f"delete {folder.name} so that an older one is resumed, or {_FRESH_START}"
        try:
            record = parse_json(path.read_bytes(), shape=_SHAPE, where=str(path), fix=fix)
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing; {fix}") from error
        except DataError as error:
            raise ConfigError(str(error)) from error
        differences = identity_differences(record.identity, identity)
        if differences:
            raise ConfigError(
                f"{folder} cannot be resumed with this configuration: " + "; ".join(differences) + ". "
                f"Fix: restore these settings and files, or {_FRESH_START}; {folder / 'huggingface'} can be "
                "its actor_rollout_ref.model.path."
            )
        return record.progress


@dataclass(slots=True, kw_only=True)
class _Record:
    progress: Progress
    identity: Identity


_SHAPE = TypeAdapter(_Record)


def run_identity(config: Config, manifest: Manifest, *, num_workers: int) -> Identity:
    """What a resumed run must share with the saved one; the rest may change between runs.

    Training data and model count by content. With other questions the position in the data means nothing, and
    with another model the reference of the KL term is another: the run would go on as a mixture of two, and
    no metric would show it. Each worker's part of the weights is a file of its own, hence their number.
    """
    model = config.actor_rollout_ref.model.path
    hashes = {facts["path"]: facts["sha256"] for facts in manifest["data"]}
    return {
        "actor_rollout_ref.model.path": f"{model} ({_model_digest(manifest['model'])})",
        "data.train_files": [f"{path} ({hashes[str(Path(path))][:12]})" for path in config.data.train_paths],
        "data.train_batch_size": config.data.train_batch_size,
        "trainer.seed": config.trainer.seed,
        "number of workers (trainer.num_cpu_workers or trainer.n_gpus_per_node)": num_workers,
    }


def _model_digest(model: Manifest) -> str:
    """One hash over sizes and hashes of the files that make the model, its tokenizer and its template."""
    files = {n: facts for n, facts in (model["files"] or {}).items() if Path(n).suffix in _MODEL_FILES}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def identity_differences(saved: Mapping[str, object], current: Mapping[str, object]) -> list[str]:
    """One phrase per key that differs, with both values."""
    return [
        f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]

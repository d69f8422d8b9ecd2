"""Where a run stands: one small JSON file in every checkpoint folder, what the driver needs to go on.

Weights, optimizer and the workers' random states are saved by the workers; this is the driver's own part. The
driver draws nothing from global generators: every seed is derived from the run's (`verl/utils/seeding.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from verl.errors import ConfigError
from verl.trainer.config.schema import Config

PROGRESS_FILE = "progress.json"
_FRESH_START = "set trainer.resume_mode=disable and another trainer.default_local_dir to start afresh"

Identity = dict[str, object]


@dataclass(slots=True, kw_only=True)
class Progress:
    """The resumable state of the driver. The trainer sets `step` after each finished step."""

    step: int = 0
    sampler: dict[str, object] = field(default_factory=dict)
    """`state_dict()` of the question sampler, opaque here; must be JSON."""

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
        record = _read(path)
        differences = identity_differences(record["identity"], identity)
        if differences:
            raise ConfigError(
                f"{folder} cannot be resumed with this configuration: " + "; ".join(differences) + ". "
                f"Fix: restore these settings, or {_FRESH_START}."
            )
        try:
            return cls(**record["progress"])
        except TypeError as error:
            raise _damaged(path, str(error)) from error


def run_identity(config: Config) -> Identity:
    """The settings a resumed run must share with the saved one: the rest may change between runs."""
    return {
        "actor_rollout_ref.model.path": config.actor_rollout_ref.model.path,
        "data.train_files": list(config.data.train_paths),
        "data.train_batch_size": config.data.train_batch_size,
        "trainer.seed": config.trainer.seed,
    }


def identity_differences(saved: Mapping[str, object], current: Mapping[str, object]) -> list[str]:
    """One phrase per key that differs, with both values."""
    return [
        f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _damaged(path, "there is no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, f"not JSON: {error}") from error
    if not isinstance(record, dict) or not all(
        isinstance(record.get(k), dict) for k in ("progress", "identity")
    ):
        raise _damaged(path, "expected an object with progress and identity")
    return record


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is not the progress of a checkpoint ({why}); delete the folder so that an older one is "
        f"resumed, or {_FRESH_START}"
    )

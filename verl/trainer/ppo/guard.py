"""Stop a run that no longer trains: count skipped updates and keep their batches.

The worker skips an update whose loss or gradient is not finite and leaves the weights as they were; after
too many in a row the run halts. Metrics that only deserve a warning are those of `alarms.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from serving.files import naming_file
from verl.errors import TrainingHaltedError
from verl.run.folder import SKIPPED
from verl.types import ScoredGroups

logger = logging.getLogger(__name__)

MAX_DUMPS = 10
"""Batches kept of one run: the first show the cause, and a batch can be large."""


class Guard:
    """Watches the updates of one run."""

    def __init__(self, run_dir: Path, *, max_skipped_updates: int) -> None:
        self._run_dir = run_dir
        self._max_skipped_updates = max_skipped_updates
        self._skipped_in_a_row = 0
        self._dumps: list[Path] = []

    def keep_skipped(self, update: Mapping[str, float], *, step: int, scored: ScoredGroups) -> None:
        """Count skipped updates in a row, and write the batch of a skipped one to `skipped/`.

        Reads `num_updates` (skipped ones included) and `skipped_updates`.
        """
        skipped = int(update["skipped_updates"])
        if not skipped:
            self._skipped_in_a_row = 0
            return
        applied = int(update["num_updates"]) - skipped
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + skipped
        if self._is_over or len(self._dumps) < MAX_DUMPS:
            self._dumps.append(self._run_dir / SKIPPED / f"step_{step:06d}.jsonl")
            dump_batch(self._dumps[-1], scored)
        logger.warning(
            "step %d: %d of %d updates skipped (loss or gradient not finite); last batch kept: %s",
            step,
            skipped,
            skipped + applied,
            self._dumps[-1],
        )

    def check(self, *, last_checkpoint: Path | None) -> None:
        """Raise TrainingHaltedError once `max_skipped_updates` updates in a row were skipped."""
        if self._is_over:
            raise TrainingHaltedError(self._halt_message(last_checkpoint))

    @property
    def _is_over(self) -> bool:
        return self._skipped_in_a_row >= self._max_skipped_updates

    def _halt_message(self, last_checkpoint: Path | None) -> str:
        good = (
            f"The last good checkpoint is {last_checkpoint}"
            if last_checkpoint
            else "No checkpoint was saved yet"
        )
        return (
            f"{self._skipped_in_a_row} updates in a row were skipped because loss or gradient "
            f"was not finite (actor_rollout_ref.actor.max_skipped_updates={self._max_skipped_updates}). "
            f"{good}; the batch is in {self._dumps[-1]}. Fix: lower actor_rollout_ref.actor.optim.lr or "
            "raise actor_rollout_ref.actor.kl_loss_coef, then run the same command to resume."
        )


def dump_batch(path: Path, scored: ScoredGroups) -> None:
    """Write one trajectory per line with its score and credit, exact enough to replay the update.

    Floats are written in full, and NaN as NaN (Python's JSON reads it): it is what the dump is for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_file(path), path.open("w", encoding="utf-8") as file:
        for sample in scored.samples():
            line = {name: asdict(part) for name, part in sample._asdict().items()}
            file.write(json.dumps(line, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")

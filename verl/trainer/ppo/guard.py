"""Stop a run that no longer trains: count skipped updates, keep their batches, warn about metrics.

The worker skips an update whose loss or gradient is not finite and leaves the weights as they were; after
too many in a row the run halts. An alarm about a metric is only a warning.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from serving.files import naming_file
from verl.errors import TrainingHaltedError
from verl.run.folder import SKIPPED
from verl.types import ScoredGroups

logger = logging.getLogger(__name__)

ENTROPY_SHARE = 0.1
"""Entropy below this share of the first measured one counts as collapsed."""
KL_LIMIT = 1.0
"""Mean KL to the reference, nats per token, above which the policy has left it."""
NO_SEARCH_LIMIT = 0.9
"""Share of trajectories without a search above which the policy has stopped searching."""
COARSE_DIFFERENCE = 0.1
"""Mean difference of engine's and trainer's log-probs, nats per token, that bfloat16 explains."""
MISMATCH_STEPS = 2
"""Steps in a row in which log-probs of engine and trainer differ by more than the limit."""
MAX_DUMPS = 10
"""Batches kept of one run: the first show the cause, and a batch can be large."""


class Guard:
    """Watches the updates and the metrics of one run."""

    def __init__(
        self,
        run_dir: Path,
        *,
        max_skipped_updates: int,
        max_log_prob_difference: float = COARSE_DIFFERENCE,
        alarm_steps: int = 5,
    ) -> None:
        """`max_log_prob_difference`: mean between engine and trainer that rounding explains, 1e-3 in float32.

        `alarm_steps`: how many steps in a row a condition must hold before it is an alarm.
        """
        self._run_dir = run_dir
        self._max_skipped_updates = max_skipped_updates
        self._skipped_in_a_row = 0
        self._dumps: list[Path] = []
        self._alarms = _make_alarms(alarm_steps, max_log_prob_difference)

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

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings due with this step's metrics, each once until its condition has ended."""
        return [warning for alarm in self._alarms if (warning := alarm.observe(metrics)) is not None]

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


@dataclass(slots=True, kw_only=True)
class _Alarm:
    """Warns of a metric that is beyond a limit for some steps in a row."""

    metric: str
    steps: int
    meaning: str
    above: float | None = None
    below_first_share: float | None = None
    """Limit as a share of the first value seen."""
    first: float | None = None
    held: int = 0

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        value = metrics.get(self.metric)
        if value is None:
            return None
        if self.first is None:
            self.first = value
        self.held = self.held + 1 if self._is_beyond(value) else 0
        if self.held != self.steps:
            return None
        return f"{self.metric} is {value:.4g} after {self.steps} steps {self._limit()}: {self.meaning}"

    def _is_beyond(self, value: float) -> bool:
        if self.above is not None:
            return value > self.above
        assert self.first is not None
        assert self.below_first_share is not None
        return value < self.first * self.below_first_share

    def _limit(self) -> str:
        if self.above is not None:
            return f"above {self.above:g}"
        return f"below {self.below_first_share:g} of its first value {self.first:.4g}"


def _make_alarms(steps: int, max_log_prob_difference: float) -> list[_Alarm]:
    return [
        _Alarm(
            metric="policy/entropy",
            steps=steps,
            below_first_share=ENTROPY_SHARE,
            meaning="the policy hardly explores any more; consider a lower lr or an entropy_coeff",
        ),
        _Alarm(
            metric="rollout/no_search_share",
            steps=steps,
            above=NO_SEARCH_LIMIT,
            meaning="the policy has stopped searching; look at the trajectories of this step",
        ),
        _Alarm(
            metric="policy/kl",
            steps=steps,
            above=KL_LIMIT,
            meaning="the policy is far from the reference; consider a lower lr or a higher kl_loss_coef",
        ),
        _Alarm(
            metric="policy/log_prob_difference_mean",
            steps=MISMATCH_STEPS,
            above=max_log_prob_difference,
            meaning="rollout/trainer mismatch: the engine samples from another policy than the one that is "
            "trained; compare precision, temperature and model of the two",
        ),
    ]

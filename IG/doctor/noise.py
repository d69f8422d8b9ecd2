"""How far a gain of few samples is off, and whether it still tells contexts of one question apart.

A gain of R samples is imitated by drawing R of the N samples of either condition, without replacement, and
compared with the gain of all N. Drawing from a finite set makes that error too small (it is 0 at R = N); the
factor sqrt(N / (N - R)) of sampling theory undoes this and gives the error against the unknown truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from IG.doctor.readings import GainRule, QuestionReading
from IG.doctor.scenarios import Scenario
from IG.doctor.statistics import rank_agreement
from IG.semantics import IntArray

NUM_SAMPLES = (1, 2, 4, 5, 8, 10, 16, 32, 64)
NUM_DRAWS = 100
NUM_JACKKNIFE_DRAWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseLevel:
    """Figures at one number of samples."""

    num_samples: int
    error: float
    """Root mean square error of the gain against that of all samples."""
    noise: float | None
    """The same against the truth; None where all samples are used: there are none to compare them with."""
    jackknife: float | None
    """Root mean square of the standard errors that the service reports; None for one sample."""
    rank_agreement: float | None
    """Mean over questions of Somers' D with the ranking of contexts by all samples; 1 is perfect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseReport:
    """Signal and noise of the gain."""

    num_questions: int
    num_gains: int
    """Gains with a context; without one the gain is 0 and has no noise."""
    max_samples: int
    signal: float
    """Standard deviation of the true gains between the scenarios of one question, no document included."""
    levels: tuple[NoiseLevel, ...]

    def noise_at(self, num_samples: int) -> float | None:
        """Error against the truth; by the jackknife where all samples are used."""
        for level in self.levels:
            if level.num_samples == num_samples:
                return level.jackknife if level.noise is None else level.noise
        return None


def measure_noise(
    readings: Sequence[QuestionReading],
    rule: GainRule,
    *,
    sizes: Iterable[int],
    rng: np.random.Generator,
    num_draws: int = NUM_DRAWS,
) -> NoiseReport | None:
    """Signal and noise at every number of samples that there are; None where no question has a context."""
    usable = [reading for reading in readings if reading.contexts]
    if not usable:
        return None
    most = min(reading.num_samples for reading in usable)
    levels = tuple(
        _level(usable, rule, size=size, num_draws=num_draws, rng=rng)
        for size in sorted({*sizes, most})
        if size <= most
    )
    return NoiseReport(
        num_questions=len(usable),
        num_gains=sum(len(reading.contexts) for reading in usable),
        max_samples=most,
        signal=_signal(usable, rule),
        levels=levels,
    )


def _level(
    readings: Sequence[QuestionReading],
    rule: GainRule,
    *,
    size: int,
    num_draws: int,
    rng: np.random.Generator,
) -> NoiseLevel:
    squares: list[float] = []
    corrected: list[float] = []
    agreements: list[float] = []
    errors: list[float] = []
    for reading in readings:
        total = reading.num_samples
        chosen = reading.draw(size=size, num_draws=num_draws, rng=rng)
        truth = np.asarray(list(reading.gains(rule).values()))  # [scenario]
        estimates = np.stack(list(reading.gains_of(rule, chosen).values()), axis=1)  # [draw, scenario]
        square = ((estimates - truth)[:, 1:] ** 2).ravel()
        squares += square.tolist()
        if size < total:
            corrected += (square * total / (total - size)).tolist()
        agreements += [tau for estimate in estimates if (tau := rank_agreement(truth, estimate)) is not None]
        errors += _standard_errors(reading, rule, chosen)
    return NoiseLevel(
        num_samples=size,
        error=_root_mean(squares),
        noise=_root_mean(corrected) if len(corrected) == len(squares) else None,
        jackknife=_root_mean(np.square(errors).tolist()) if errors else None,
        rank_agreement=float(np.mean(agreements)) if agreements else None,
    )


def _standard_errors(
    reading: QuestionReading, rule: GainRule, chosen: dict[Scenario, IntArray]
) -> list[float]:
    num_draws = min(NUM_JACKKNIFE_DRAWS, len(chosen[Scenario.none]))
    found = [
        error
        for draw in range(num_draws)
        for error in reading.standard_errors(rule, {name: rows[draw] for name, rows in chosen.items()})
    ]
    return [error for error in found if error is not None]


def _signal(readings: Sequence[QuestionReading], rule: GainRule) -> float:
    """Spread of gains within questions, less what their noise adds to it.

    A baseline that is off shifts all gains of its question except the 0 of no document, so the noise adds the
    mean variance of the conditions, the baseline being one of them.
    """
    seen = [np.asarray(list(reading.gains(rule).values())).var(ddof=1) for reading in readings]
    added = [
        np.mean([(error or 0.0) ** 2 for error in reading.condition_errors(rule)]) for reading in readings
    ]
    return float(np.sqrt(max(0.0, float(np.mean(seen) - np.mean(added)))))


def _root_mean(squares: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(squares)))

"""How far a gain of few samples is off, and whether it still tells contexts of one question apart.

A gain of R samples is imitated by drawing R of the N samples of either condition, without replacement, and
compared with the gain of all N. Drawing from a finite set makes that error too small (it is 0 at R = N); the
factor sqrt(N / (N - R)) of sampling theory undoes this and gives the error against the unknown truth. That of
all N is what half of them are off from all, to the first order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from IG.doctor.readings import GainRule, QuestionReading
from IG.doctor.scenarios import Scenario
from IG.doctor.statistics import rank_agreement
from IG.semantics import FloatArray

NUM_SAMPLES = (1, 2, 4, 5, 8, 10, 16, 32, 64)
NUM_DRAWS = 100
NUM_JACKKNIFE_DRAWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseLevel:
    """Figures at one number of samples."""

    num_samples: int
    error: float
    """Root mean square error of the gain against that of all samples."""
    noise: float
    """The same against the truth."""
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
        """Error against the truth; None for a number that was not looked at."""
        return next((level.noise for level in self.levels if level.num_samples == num_samples), None)


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
    errors = [_errors_of_all(reading, rule, num_draws=num_draws, rng=rng) for reading in usable]
    levels = tuple(
        _level(usable, rule, size=size, num_draws=num_draws, rng=rng)
        for size in sorted(set(sizes))
        if size < most
    )
    everything = NoiseLevel(
        num_samples=most,
        error=0.0,
        noise=_root_mean_square([error[:, 1:] for error in errors]),
        jackknife=_root_mean_square([_reported(reading, rule, size=most, rng=rng) for reading in usable]),
        rank_agreement=None,
    )
    return NoiseReport(
        num_questions=len(usable),
        num_gains=sum(len(reading.contexts) for reading in usable),
        max_samples=most,
        signal=_signal(usable, rule, errors=errors),
        levels=(*levels, everything),
    )


def _level(
    readings: Sequence[QuestionReading],
    rule: GainRule,
    *,
    size: int,
    num_draws: int,
    rng: np.random.Generator,
) -> NoiseLevel:
    errors: list[FloatArray] = []
    corrected: list[FloatArray] = []
    agreements: list[float] = []
    for reading in readings:
        truth, estimates = _estimates(reading, rule, size=size, num_draws=num_draws, rng=rng)
        errors.append((estimates - truth)[:, 1:])
        corrected.append(errors[-1] * np.sqrt(reading.num_samples / (reading.num_samples - size)))
        agreements += [tau for estimate in estimates if (tau := rank_agreement(truth, estimate)) is not None]
    reported = [_reported(reading, rule, size=size, rng=rng) for reading in readings]
    return NoiseLevel(
        num_samples=size,
        error=_root_mean_square(errors),
        noise=_root_mean_square(corrected),
        jackknife=_root_mean_square(reported) if size > 1 else None,
        rank_agreement=float(np.mean(agreements)) if agreements else None,
    )


def _estimates(
    reading: QuestionReading, rule: GainRule, *, size: int, num_draws: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Gains `[scenario]` of all samples, and `[draw, scenario]` of `size` samples; the first is 0."""
    chosen = reading.draw(size=size, num_draws=num_draws, rng=rng)
    truth = np.asarray(list(reading.gains(rule).values()))
    return truth, np.stack(list(reading.gains_of(rule, chosen).values()), axis=1)


def _errors_of_all(
    reading: QuestionReading, rule: GainRule, *, num_draws: int, rng: np.random.Generator
) -> FloatArray:
    """How far the gains of all samples may be off, `[draw, scenario]`, read off halves of them."""
    total, half = reading.num_samples, reading.num_samples // 2
    truth, estimates = _estimates(reading, rule, size=half, num_draws=num_draws, rng=rng)
    return np.asarray((estimates - truth) * np.sqrt(half / (total - half)))


def _reported(reading: QuestionReading, rule: GainRule, *, size: int, rng: np.random.Generator) -> FloatArray:
    """Standard errors that the service would report with every context, of several draws."""
    chosen = reading.draw(size=size, num_draws=NUM_JACKKNIFE_DRAWS, rng=rng)
    found = [
        error
        for draw in range(len(chosen[Scenario.none]))
        for error in reading.standard_errors(rule, {name: rows[draw] for name, rows in chosen.items()})
    ]
    return np.asarray([error for error in found if error is not None])


def _signal(readings: Sequence[QuestionReading], rule: GainRule, *, errors: Sequence[FloatArray]) -> float:
    """Spread of gains within questions, less what their errors `[draw, scenario]` add to it.

    Not by the jackknife: it knows nothing of the limit of a log-ratio.
    """
    seen = [np.asarray(list(reading.gains(rule).values())).var(ddof=1) for reading in readings]
    added = [error.var(axis=1, ddof=1).mean() for error in errors]
    return float(np.sqrt(max(0.0, float(np.mean(seen) - np.mean(added)))))


def _root_mean_square(values: Sequence[FloatArray]) -> float:
    return float(np.sqrt(np.square(np.concatenate([each.ravel() for each in values])).mean()))

"""Measure how far a gain of few samples is from the truth, against how much gains truly differ.

A gain of R samples is simulated by drawing R of the N samples of either condition, without replacement, and
compared with the gain of all N. Drawing from a finite set makes that error too small; the finite-population
factor sqrt(N / (N - R)) corrects it to the error against the unknown truth. The error of all N samples is,
to first order, the difference between half of them and all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from IG.config import IGServiceConfig
from IG.doctor.readings import QuestionReading
from IG.semantics import FloatArray

NUM_SAMPLES = (1, 2, 4, 5, 8, 10, 16, 32, 64)
NUM_DRAWS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Signal and noise of the gain."""

    signal: float
    """Standard deviation of the true gains between the scenarios of one question, no document included."""
    levels: dict[int, float]
    """Root mean square error of the gain against the truth, by samples per condition, ascending."""


def measure_noise(
    readings: Sequence[QuestionReading],
    config: IGServiceConfig,
    *,
    rng: np.random.Generator,
    sizes: Iterable[int] = NUM_SAMPLES,
    num_draws: int = NUM_DRAWS,
) -> Noise | None:
    """Measure the noise at `sizes`, at the configured number of samples and at all samples.

    Returns None where no question has a context.
    """
    usable = [reading for reading in readings if reading.contexts]
    if not usable:
        return None
    most = min(reading.num_samples for reading in usable)

    def errors(size: int, *, of_all: bool = False) -> list[FloatArray]:
        return [
            _errors(reading, config, size=size, of_all=of_all, num_draws=num_draws, rng=rng)
            for reading in usable
        ]

    levels = {
        size: _root_mean_square(errors(size))
        for size in sorted({*sizes, config.num_generations})
        if size < most
    }
    errors_of_all = errors(most // 2, of_all=True)
    return Noise(
        signal=_signal(usable, config, errors=errors_of_all),
        levels=levels | {most: _root_mean_square(errors_of_all)},
    )


def _errors(
    reading: QuestionReading,
    config: IGServiceConfig,
    *,
    size: int,
    of_all: bool,
    num_draws: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Return errors `[draw, scenario]` of gains of `size` samples; of all samples, from draws of half."""
    chosen = reading.draw(size=size, num_draws=num_draws, rng=rng)
    estimates = np.stack(list(reading.gains_of(chosen, config).values()), axis=1)  # [draw, scenario]
    truth = np.asarray(list(reading.gains(config).values()))  # [scenario]
    total, rest = reading.num_samples, reading.num_samples - size
    return np.asarray((estimates - truth) * np.sqrt((size if of_all else total) / rest))


def _signal(
    readings: Sequence[QuestionReading], config: IGServiceConfig, *, errors: Sequence[FloatArray]
) -> float:
    """Return the spread of gains within questions, less what their errors `[draw, scenario]` add to it."""
    seen = [np.asarray(list(reading.gains(config).values())).var(ddof=1) for reading in readings]
    added = [error.var(axis=1, ddof=1).mean() for error in errors]
    return float(np.sqrt(max(0.0, float(np.mean(seen) - np.mean(added)))))


def _root_mean_square(errors: Sequence[FloatArray]) -> float:
    """Return the RMS over all gains with a context; the first scenario has none and no error."""
    return float(np.sqrt(np.square(np.concatenate([error[:, 1:].ravel() for error in errors])).mean()))

"""What is asked of the IG service and what comes back, as plain facts: standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRequest:
    """One gain to measure."""

    question: str
    context: str
    """All passages that were found, as one text; empty asks for the baseline, whose gain is 0."""
    golds: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GainResult:
    """A gain, or why there is none; exactly one of `gain` and `error` is None."""

    gain: float | None
    standard_error: float | None = None
    """Of the gain; None where the service gives none (a single sample, an older service)."""
    error: str | None = None
    retryable: bool = False
    """Whether asking again may help: the service was not reached or ran out of time."""

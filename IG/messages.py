"""The request and the result of one gain; imports the standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRequest:
    """One gain to measure."""

    question: str
    context: str
    """All passages that were found, as one text; empty measures the baseline, whose gain is 0."""
    golds: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GainResult:
    """A gain, or why there is none; exactly one of `gain` and `error` is None."""

    gain: float | None
    standard_error: float | None = None
    """Of the gain; None for a single sample and from a published service."""
    error: str | None = None
    retryable: bool = False
    """Whether the same request may succeed later: the service was not reached or ran out of time."""

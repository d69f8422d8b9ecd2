"""Requests and results of the service, one gain or pair each; imports the standard library only."""

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
    belief_with_context: float | None = None
    """What the gain compares, in [0, 1]; None from a published service."""
    belief_no_context: float | None = None
    error: str | None = None
    retryable: bool = False
    """Whether the same request may succeed later: the service was not reached or ran out of time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntailmentResult:
    """P(premise entails hypothesis), or why there is none; exactly one of the first two fields is None."""

    probability: float | None
    error: str | None = None
    retryable: bool = False
    """As of `GainResult`."""

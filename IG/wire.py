"""Write the requests of the client and read the answers; only finite numbers are accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

from IG.messages import GainRequest, GainResult
from serving.http import CallError

SERVICE = "IG service"
_LONGEST_TIMEOUT_S = 86400.0
"""The longest deadline that the service accepts."""
_ROUNDING = 1e-6
_LARGEST_LIMIT = 20.0
"""Largest plausible `gain_limit`: an entropy of 20 nats takes 5e8 different answers."""


def make_payload(requests: Sequence[GainRequest], left_s: float) -> dict[str, object]:
    """Return the body of a request; its deadline lies before ours, so that partial results arrive in time."""
    return {
        "items": [
            {
                "question": _valid_text(request.question),
                "context": _valid_text(request.context),
                "answers": [_valid_text(gold) for gold in request.golds],
            }
            for request in requests
        ],
        "include_details": False,
        "timeout_s": min(_LONGEST_TIMEOUT_S, max(0.001, left_s - min(2.0, 0.2 * left_s))),
    }


def _valid_text(text: str) -> str:
    """Replace lone surrogates, which have no UTF-8 form and would fail the whole request."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_results(body: Mapping[str, object], *, expected: int) -> list[GainResult]:
    """Return the results of an answer. Raises CallError when it does not match its request."""
    scores, errors = body.get("scores"), body.get("errors")
    if not isinstance(scores, list) or not isinstance(errors, list):
        raise CallError(
            SERVICE, f"the answer must hold lists scores and errors, got the keys {sorted(body)!s:.100}"
        )
    spreads = body.get("standard_errors", [None] * expected)
    if not isinstance(spreads, list) or not len(scores) == len(errors) == len(spreads) == expected:
        counts = f"{len(scores)} scores and {len(errors)} errors"
        raise CallError(SERVICE, f"asked for {expected} scores, got {counts}")
    limit = _as_number(body.get("gain_limit", 1.0))  # the published gain is a difference of probabilities
    if limit is None or not 0 < limit <= _LARGEST_LIMIT:
        expected_limit = f"a number above 0 up to {_LARGEST_LIMIT:g}"
        raise CallError(SERVICE, f"gain_limit must be {expected_limit}, got {body['gain_limit']!r:.100}")
    return [_read_result(*parts, limit=limit) for parts in zip(scores, spreads, errors, strict=True)]


def _read_result(score: object, spread: object, error: object, *, limit: float) -> GainResult:
    if error is not None:
        return failed(f"{error!s:.300}", retryable=str(error).startswith("deadline"))
    gain, standard_error = _as_number(score), _as_number(spread)
    if gain is None:
        return failed(f"a finite score was expected, got {score!r:.100}")
    if abs(gain) > limit + _ROUNDING:
        return failed(f"a score from {-limit:g} to {limit:g} was expected, got {gain:g}")
    if spread is not None and (standard_error is None or standard_error < 0):
        return failed(f"a standard error was expected, got {spread!r:.100}")
    return GainResult(gain=gain, standard_error=standard_error)


def _as_number(value: object) -> float | None:
    """Return the value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):
        return number if math.isfinite(number := float(value)) else None
    return None


def failed(message: str, *, retryable: bool = False) -> GainResult:
    """Return a result without a gain."""
    return GainResult(gain=None, error=f"{SERVICE}: {message}", retryable=retryable)


def read_work(body: Mapping[str, object]) -> dict[str, int]:
    """Return the work counters of an answer; empty from a service without them."""
    work = body.get("work")
    counted = work.items() if isinstance(work, dict) else ()
    return {name: count for name, count in counted if isinstance(count, int) and not isinstance(count, bool)}

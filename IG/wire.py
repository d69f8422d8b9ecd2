"""Write the requests of the client and read the answers; only finite numbers are accepted.

A `Wire` is one kind of request: `GAINS` and `ENTAILMENT`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from IG.messages import EntailmentResult, GainRequest, GainResult
from serving.encoding import replace_surrogates
from serving.http import CallError

SERVICE = "IG service"
MAX_TIMEOUT_S = 86400.0
"""The longest deadline that the service accepts."""
_ROUNDING = 1e-6
_LARGEST_LIMIT = 20.0
"""Largest plausible `gain_limit`: an entropy of 20 nats takes 5e8 different answers."""


RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire(Generic[RequestT, ResultT]):
    """How requests of one kind are sent, many at a time, and how their results are read."""

    path: str
    make_payload: Callable[[Sequence[RequestT]], dict[str, object]]
    read_results: Callable[[Mapping[str, object], int], list[ResultT]]
    """Of an answer to so many requests. Raises CallError when it does not match its request."""
    fail: Callable[[str, bool], ResultT]
    """Makes a result of an error and whether the same request may succeed later."""


def choose_deadline(left_s: float) -> float:
    """Return the service's deadline, which lies before ours, so that partial results arrive in time."""
    return min(MAX_TIMEOUT_S, max(0.001, left_s - min(2.0, 0.2 * left_s)))


def _make_gain_payload(requests: Sequence[GainRequest]) -> dict[str, object]:
    return {
        "items": [
            {
                "question": replace_surrogates(request.question),
                "context": replace_surrogates(request.context),
                "answers": [replace_surrogates(gold) for gold in request.golds],
            }
            for request in requests
        ],
        "include_details": False,
    }


def _make_pair_payload(pairs: Sequence[tuple[str, str]]) -> dict[str, object]:
    return {
        "pairs": [
            {"premise": replace_surrogates(premise), "hypothesis": replace_surrogates(hypothesis)}
            for premise, hypothesis in pairs
        ]
    }


def _read_gains(body: Mapping[str, object], expected: int) -> list[GainResult]:
    scores, errors = _read_lists(body, ("scores", "errors"), expected=expected)
    limit = _as_number(body.get("gain_limit", 1.0))  # the published gain is a difference of probabilities
    if limit is None or not 0 < limit <= _LARGEST_LIMIT:
        expected_limit = f"a number above 0 up to {_LARGEST_LIMIT:g}"
        raise CallError(SERVICE, f"gain_limit must be {expected_limit}, got {body['gain_limit']!r:.100}")
    # A published service has none of these.
    optional = ("standard_errors", "beliefs_with_context", "beliefs_no_context")
    defaults: dict[str, object] = dict.fromkeys(optional, [None] * expected)
    lists = _read_lists(defaults | dict(body), optional, expected=expected)
    return [_read_gain(*parts, limit=limit) for parts in zip(scores, errors, *lists, strict=True)]


def _read_lists(body: Mapping[str, object], names: Sequence[str], *, expected: int) -> list[list[object]]:
    """Return these lists of an answer. Raises CallError unless each has the expected length."""
    lists = [found for name in names if isinstance(found := body.get(name), list)]
    if len(lists) < len(names):
        keys = f"{sorted(body)!s:.100}"
        raise CallError(SERVICE, f"the answer must hold lists {' and '.join(names)}, got the keys {keys}")
    if any(len(found) != expected for found in lists):
        counts = " and ".join(f"{len(found)} {name}" for name, found in zip(names, lists, strict=True))
        raise CallError(SERVICE, f"asked for {expected} {names[0]}, got {counts}")
    return lists


def _read_gain(
    score: object, error: object, spread: object, after: object, before: object, *, limit: float
) -> GainResult:
    if error is not None:
        return _fail_gain(*_service_error(error))
    gain, standard_error = _as_number(score), _as_number(spread)
    problem = None
    if gain is None:
        problem = f"a finite score was expected, got {score!r:.100}"
    elif abs(gain) > limit + _ROUNDING:
        problem = f"a score from {-limit:g} to {limit:g} was expected, got {gain:g}"
    elif spread is not None and (standard_error is None or standard_error < 0):
        problem = f"a standard error was expected, got {spread!r:.100}"
    elif not all(belief is None or _is_probability(belief) for belief in (after, before)):
        problem = f"beliefs from 0 to 1 were expected, got {after!r:.50} and {before!r:.50}"
    if problem is not None:
        return _fail_gain(f"{SERVICE}: {problem}", False)
    return GainResult(
        gain=gain,
        standard_error=standard_error,
        belief_with_context=_as_number(after),
        belief_no_context=_as_number(before),
    )


def _fail_gain(error: str, retryable: bool) -> GainResult:
    return GainResult(gain=None, error=error, retryable=retryable)


def _read_probabilities(body: Mapping[str, object], expected: int) -> list[EntailmentResult]:
    probabilities, errors = _read_lists(body, ("probabilities", "errors"), expected=expected)
    return [_read_probability(*parts) for parts in zip(probabilities, errors, strict=True)]


def _read_probability(probability: object, error: object) -> EntailmentResult:
    if error is not None:
        return _fail_pair(*_service_error(error))
    if not _is_probability(probability):
        return _fail_pair(f"{SERVICE}: a probability was expected, got {probability!r:.100}", False)
    return EntailmentResult(probability=_as_number(probability))


def _fail_pair(error: str, retryable: bool) -> EntailmentResult:
    return EntailmentResult(probability=None, error=error, retryable=retryable)


def _service_error(error: object) -> tuple[str, bool]:
    """Return the error of an item, and whether the same request may succeed later."""
    return f"{SERVICE}: {error!s:.300}", str(error).startswith("deadline")


def _is_probability(value: object) -> bool:
    number = _as_number(value)
    return number is not None and -_ROUNDING <= number <= 1.0 + _ROUNDING


def _as_number(value: object) -> float | None:
    """Return the value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):
        return number if math.isfinite(number := float(value)) else None
    return None


def read_work(body: Mapping[str, object]) -> dict[str, int]:
    """Return the work counters of an answer; empty from a service without them."""
    work = body.get("work")
    counted = work.items() if isinstance(work, dict) else ()
    return {name: count for name, count in counted if isinstance(count, int) and not isinstance(count, bool)}


GAINS = Wire(
    path="/compute_info_gain",
    make_payload=_make_gain_payload,
    read_results=_read_gains,
    fail=_fail_gain,
)
ENTAILMENT = Wire(
    path="/entailment",
    make_payload=_make_pair_payload,
    read_results=_read_probabilities,
    fail=_fail_pair,
)

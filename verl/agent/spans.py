"""Find the tokens that hold a part of a sampled text, without encoding anything again."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def find_token_span(
    ids: Sequence[int], start: int, end: int, *, text: str, decode: Callable[[Sequence[int]], str]
) -> tuple[int, int]:
    """Return the span of the tokens with at least one of the characters `[start, end)` of `text`.

    `text` is `decode(ids)`. An empty range of characters gives an empty span.
    """

    def covered(count: int) -> int:
        # A prefix may end in half a character, which decodes to something else than it becomes.
        prefix = decode(ids[:count])
        if text.startswith(prefix):
            return len(prefix)
        return next(n for n, (a, b) in enumerate(zip(prefix, text + "\0", strict=False)) if a != b)

    def fewest(reached: Callable[[int], bool]) -> int:
        """Return the fewest tokens whose characters satisfy `reached`, by bisection: coverage only grows."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(covered(middle)) else (middle + 1, high)
        return low

    first = fewest(lambda characters: characters >= start)
    if covered(first) > start:
        first -= 1
    last = fewest(lambda characters: characters >= end) if end > start else first
    return first, last

"""Find the tokens that hold a part of a text, without encoding anything again."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from verl.types import IntArray, Span, SpanKind

THINK_TAG = "<think>"


def opens_thought(ids: IntArray, *, decode: Callable[[Sequence[int]], str]) -> bool:
    """Return whether the text of the tokens ends in `<think>`, which the chat template then opened."""
    # As many tokens as characters are enough.
    return decode(ids[-len(f"{THINK_TAG}\n") :].tolist()).rstrip().endswith(THINK_TAG)


class DecodedText:
    """The text of tokens, and which of them hold a part of it."""

    def __init__(self, ids: Sequence[int], *, decode: Callable[[Sequence[int]], str]) -> None:
        self.text = decode(ids)
        self._ids = ids
        self._decode = decode
        self._covered: dict[int, int] = {}

    def find_tokens(self, start: int, end: int) -> tuple[int, int]:
        """Return the span of the tokens with at least one of the characters `[start, end)`.

        An empty range of characters gives an empty span.
        """
        first = self._count_tokens(start)
        if self.count_characters(first) > start:
            first -= 1
        return first, self._count_tokens(end) if end > start else first

    def make_span(
        self, kind: SpanKind, start: int, end: int, *, closing_end: int | None = None, text: str | None = None
    ) -> Span:
        """Return the span of the characters `[start, end)`, stripped.

        `closing_end` is where the markup that closes it ends, and `text` what the policy meant, where that is
        not what the text says.
        """
        inner = self.text[start:end]
        meant = inner.strip()
        start += len(inner) - len(inner.lstrip() or inner)
        first, last = self.find_tokens(start, start + len(meant))
        outer_end = last if closing_end is None else self._count_tokens(closing_end)
        return Span(
            kind=kind,
            start=first,
            end=last,
            text=meant if text is None else text,
            num_closing=max(0, outer_end - last),
        )

    def _count_tokens(self, characters: int) -> int:
        """Return the fewest tokens that cover so many characters; coverage only grows."""
        return bisect_left(range(len(self._ids)), characters, key=self.count_characters)

    def count_characters(self, count: int) -> int:
        """Return the number of characters of the text that the first `count` tokens hold."""
        if not 0 < count < len(self._ids):
            return len(self.text) if count else 0
        if count not in self._covered:
            # A prefix may end in half a character, which decodes to something else than it becomes.
            prefix = self._decode(self._ids[:count])
            self._covered[count] = (
                len(prefix)
                if self.text.startswith(prefix)
                else next(n for n, (a, b) in enumerate(zip(prefix, self.text + "\0", strict=False)) if a != b)
            )
        return self._covered[count]

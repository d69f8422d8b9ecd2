"""Sampled token ids -> `Action`, with the token span of the query or answer; nothing is ever encoded again.

Generation stops at the first `</search>` or `</answer>`. This closing tag and the nearest opening tag of
the same name before it are the action; a second complete pair is never sampled. Tags that were opened
earlier and never closed, as in `<think> I may use <search> </think><answer> a </answer>`, do not spoil it.
Search-R1 reads the same, with two exceptions: it also searches for an empty query, and of a tag that was
opened twice it reads from the first opening.

Tags may be tokens of their own, spread over several, or merged with their neighbors in one token. Text after
the closing tag in the last token stays in the ids, because the policy did sample it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from verl.types import Action, ActionKind

STOP_STRINGS = ("</search>", "</answer>")

_CLOSING_TAG = re.compile(r"</(search|answer)>")
_INVALID = Action(kind=ActionKind.INVALID)


def parse_action(ids: Sequence[int], *, decode: Callable[[Sequence[int]], str]) -> Action:
    """Read the action that stopped the turn.

    INVALID is: no closing tag, one that was not opened before, an empty query. An empty answer is an answer
    (a wrong one). The span holds every token with at least one character of the stripped text, also when it
    shares that token with a tag.
    """
    text = decode(ids)
    located = _locate(text)
    if located is None:
        return _INVALID
    kind, start, end = located
    inner = text[start:end]
    content = inner.strip()
    if kind is ActionKind.SEARCH and not content:
        return _INVALID
    start += len(inner) - len(inner.lstrip()) if content else 0
    first, last = _token_span(ids, start, start + len(content), text=text, decode=decode)
    return Action(kind=kind, text=content, start=first, end=last)


def _locate(text: str) -> tuple[ActionKind, int, int] | None:
    """Kind and characters `[start, end)` between the tags of the action."""
    closing = _CLOSING_TAG.search(text)
    if closing is None:
        return None
    opening = f"<{closing.group(1)}>"
    opened = text.rfind(opening, 0, closing.start())
    return None if opened < 0 else (ActionKind(closing.group(1)), opened + len(opening), closing.start())


def _token_span(
    ids: Sequence[int], start: int, end: int, *, text: str, decode: Callable[[Sequence[int]], str]
) -> tuple[int, int]:
    """Tokens that hold characters `[start, end)` of `text`; an empty range gives an empty span."""

    def covered(count: int) -> int:
        # A prefix may end in half a character, which decodes to something else than it becomes.
        prefix = decode(ids[:count])
        if text.startswith(prefix):
            return len(prefix)
        return next(n for n, (a, b) in enumerate(zip(prefix, text + "\0", strict=False)) if a != b)

    def fewest(reached: Callable[[int], bool]) -> int:
        """Fewest tokens whose characters satisfy `reached`, by bisection: coverage only grows."""
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

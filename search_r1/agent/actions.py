"""Sampled token ids -> `Action`, with the token span of the query or answer; nothing is ever encoded again.

An action is the first `<search>..</search>` or `<answer>..</answer>` pair. Tags may be tokens of their own,
spread over several, or merged with their neighbours in one token. Whatever the last token holds after the
closing tag stays in the ids, because the policy did sample it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from verl.types import Action, ActionKind

STOP_STRINGS = ("</search>", "</answer>")

_TAG = re.compile(r"<(/?)(think|search|information|answer)>")
_INVALID = Action(kind=ActionKind.INVALID)


def parse_action(ids: Sequence[int], *, decode: Callable[[Sequence[int]], str]) -> Action:
    """Read the first action.

    INVALID is: none, an unclosed one, another tag inside it, a closing tag first, an empty query. An empty
    answer is an answer (a wrong one). The span holds every token with at least one character of the stripped
    text, also when it shares that token with a tag.
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
    """Kind and characters `[start, end)` between the tags of the first action."""
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        closes, name = tag.group(1) == "/", tag.group(2)
        if opened is not None:
            if closes and name == opened.group(2):
                return ActionKind(name), opened.end(), tag.start()
            return None
        if name in ("think", "information"):
            continue
        if closes:
            return None
        opened = tag
    return None


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

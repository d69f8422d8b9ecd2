"""Read and neutralize the tags that all packaged formats share: `<search> q </search>`, `<think>..</think>`.

Generation stops at the first closing tag of an action (a tool call, an answer). This tag and the nearest
opening tag of the same name before it are the action; a second complete pair is never sampled. Tags that were
opened earlier and never closed, as in `<think> I may use <search> </think><answer> a </answer>`, are ignored.

Tags may be tokens of their own, spread over several, or merged with their neighbors in one token. Text after
the closing tag in the last token stays in the ids, because the policy sampled it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from verl.agent.prompts import SURROGATE
from verl.agent.spans import DecodedText
from verl.errors import ConfigError
from verl.types import Message, Span, SpanKind

ANSWER, TOOL_CALL = "answer", "tool_call"
TAG_NAMES = ("think", "search", "information", ANSWER, "documents", "refine", TOOL_CALL, "tool_response")
"""Of all packaged formats: the policy may have been trained with another one."""
TAGS = tuple(f"<{slash}{name}>" for name in TAG_NAMES for slash in ("", "/"))
THINK, _THINK_END = SpanKind.THINK, "</think>"
_TAG = re.compile(r"</?([\w-]+)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """A part of a text between two tags, in characters."""

    name: str
    """Empty where there is none: then all positions are the end of what can be read."""
    start: int
    end: int
    closing_end: int
    """End of the closing tag."""


class TagReader:
    """Reads completions whose actions and parts are in tags, and neutralizes tags in texts from outside."""

    def __init__(
        self, *, actions: Sequence[str], parts: Sequence[SpanKind] = (SpanKind.THINK,), others: Iterable[str]
    ) -> None:
        """Take the names of tags: of actions, of parts, and of `others` that are only neutralized."""
        names = "|".join(map(re.escape, actions))
        self._part_names = tuple(parts)
        self.stop_strings = tuple(f"</{name}>" for name in actions)
        self._closing_tag = re.compile(f"</({names})>")
        # A summary that is not closed ends at the next tag of an action; an unclosed thought is not a part.
        ends = {SpanKind.REFINE: f"(?:</refine>|(?=</?(?:{names})>))"}
        self._parts = re.compile(
            "|".join(f"<{kind}>(?P<{kind}>.*?){ends.get(kind, f'</{kind}>')}" for kind in parts), re.DOTALL
        )
        any_name = "|".join(map(re.escape, {*TAG_NAMES, *actions, *others}))
        self._any_tag = re.compile(rf"<(?=/?(?:{any_name})>)", re.IGNORECASE)

    def read(self, decoded: DecodedText) -> tuple[Element, tuple[Span, ...]]:
        """Return the action that ended a completion, and the spans of the parts before it."""
        text = decoded.text
        closing = self._closing_tag.search(text)
        end = closing.end() if closing else len(text)
        action = Element(name="", start=end, end=end, closing_end=end)
        if closing and (opened := text.rfind(f"<{closing[1]}>", 0, closing.start())) >= 0:
            start = opened + len(f"<{closing[1]}>")
            action = Element(name=closing[1], start=start, end=closing.start(), closing_end=end)
        # Parts end before the action: `<think> <answer> a </answer> </think>` is an answer, not a thought.
        spans = []
        thought_end = self._find_opened_thought(text, action.start)
        if thought_end:
            spans.append(decoded.make_span(THINK, 0, thought_end, closing_end=thought_end + len(_THINK_END)))
        for part in self._parts.finditer(text, thought_end, action.start):
            kind = SpanKind(str(part.lastgroup))
            start, end = part.span(kind)
            is_closed = part.end() > end
            spans.append(decoded.make_span(kind, start, end, closing_end=part.end() if is_closed else None))
        return action, tuple(spans)

    def _find_opened_thought(self, text: str, end: int) -> int:
        """Return where the thought ends that the prompt has opened, as some chat templates do; 0 if none is.

        It is closed before any part is opened.
        """
        closing = max(0, text.find(_THINK_END, 0, end))
        is_first = not any(f"<{part}>" in text[:closing] for part in self._part_names)
        return closing if THINK in self._part_names and is_first else 0

    def neutralize(self, text: str) -> str:
        """Return the text with a space after the `<` of every tag, as in `< /information>`.

        A page can then neither end its observation nor contain an action. Half characters, which no tokenizer
        reads, become U+FFFD. Other text stays as it is.
        """
        return SURROGATE.sub("\ufffd", self._any_tag.sub("< ", text))


def find_missing_tag(messages: Sequence[Message], names: Iterable[str]) -> str | None:
    """Return what a prompt lacks if one of these tags, which the policy must write, is not in it."""
    for name in names:
        if not any(f"<{name}>" in message.content for message in messages):
            return f"never says to write between <{name}> and </{name}>"
    return None


def find_wrapper(observation: str, *, key: str, actions: Sequence[str]) -> list[str]:
    """Return the names of the tags around an observation, which is the entry `key` of the prompt file.

    Raises ConfigError for tags that are not closed in order, and for those of an action: a stop string.
    """
    before, _, after = observation.format(text="\0").partition("\0")
    opened, closed = ([found[0] for found in _TAG.finditer(part)] for part in (before, after))
    names = [tag[1:-1] for tag in opened]
    if closed != [f"</{name}>" for name in reversed(names)] or {*names} & {*actions}:
        raise ConfigError(
            f"data.prompt_file: {key} is {observation!r}, expected tags around {{text}} that are opened "
            f"before and closed after it, none of them {' or '.join(actions)}"
        )
    return names

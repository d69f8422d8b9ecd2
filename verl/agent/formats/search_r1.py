"""The tags of Search-R1: `<search> query </search>`, `<information>..</information>`, `<answer> a </answer>`.

Every tool with one argument has a tag of its name. The tags around an observation are those of the prompt
file. The packaged ones and the passage lines (`verl.agent.tools.search`) have the bytes of Search-R1's, so
that released checkpoints read what they were trained on; the other texts are worded by us.

Generation stops at the first closing tag of a tool or answer. This tag and the nearest opening tag of the
same name before it are the action; a second complete pair is never sampled. Tags that were opened earlier
and never closed, as in `<think> I may use <search> </think><answer> a </answer>`, are ignored. Search-R1
reads the same, with two exceptions: it also searches for an empty query, and of a tag that was opened twice
it reads from the first opening.

Tags may be tokens of their own, spread over several, or merged with their neighbors in one token. Text after
the closing tag in the last token stays in the ids, because the policy sampled it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from verl.agent.spans import find_token_span
from verl.errors import ConfigError
from verl.protocols import FixedText, Tokenizer
from verl.types import (
    Action,
    ActionKind,
    Finish,
    Message,
    Observation,
    Question,
    Span,
    SpanKind,
    ToolCall,
    ToolSpec,
    Turn,
)

_THINK, _ANSWER = "think", "answer"
_TAG_NAMES = (_THINK, "search", "information", _ANSWER, "documents", "refine", "tool_call", "tool_response")
"""Those of this format, and those of others that a policy may have been trained on."""
_TAG = re.compile(r"</?([\w-]+)>")
_THOUGHT = re.compile(rf"<{_THINK}>(.*?)</{_THINK}>", re.DOTALL)


class SearchR1Format:
    """The prompt format `search_r1`."""

    tags: ClassVar[tuple[str, ...]] = tuple(f"<{slash}{name}>" for name in _TAG_NAMES for slash in ("", "/"))
    texts: ClassVar[Mapping[str, FixedText]] = {
        "instruction": FixedText(required=("question",), optional=("tools",)),
        "instruction_for_tools": FixedText(required=("question", "tools")),
        "observation": FixedText(required=("text",)),
        "retry": FixedText(optional=("tools",)),
        "retry_for_tools": FixedText(required=("tools",)),
    }
    max_calls = 1

    def __init__(self, *, tokenizer: Tokenizer, texts: Mapping[str, str], tools: Sequence[ToolSpec]) -> None:
        """Raise ConfigError for a tool without exactly one argument, or a name that is another tag's."""
        wrapper = _find_wrapper(texts["observation"], actions=[*(tool.name for tool in tools), _ANSWER])
        reserved = {*_TAG_NAMES, *wrapper} - {"search"}
        for tool in tools:
            if len(tool.parameters) != 1 or tool.name in reserved:
                raise ConfigError(
                    f"agent.tools={tool.name} cannot be called with agent.format=search_r1, which passes one "
                    f"argument (it takes {len(tool.parameters)}) to a tool whose name is not that of another "
                    "tag; choose another format or leave the tool out"
                )
        self._tokenizer = tokenizer
        self._tools = {tool.name: tool for tool in tools}
        self._observation = texts["observation"]
        names = [*self._tools, _ANSWER]
        self.stop_strings = tuple(f"</{name}>" for name in names)
        self._closing_tag = re.compile(f"</({'|'.join(map(re.escape, names))})>")
        any_name = "|".join(map(re.escape, {*_TAG_NAMES, *wrapper, *self._tools}))
        self._any_tag = re.compile(rf"<(?=/?(?:{any_name})>)", re.IGNORECASE)
        # The texts without a list of tools are worded for `search` alone.
        kind = "" if [*self._tools] == ["search"] else "_for_tools"
        self._instruction = texts[f"instruction{kind}"]
        self._tool_list = "\n".join(
            f"<{tool.name}> {parameter} </{tool.name}>: {tool.description}"
            for tool in tools
            for parameter in tool.parameters
        )
        retry = texts[f"retry{kind}"].format(tools=self._tool_list)
        self._retry_ids = tokenizer.encode(retry)
        self._retry_turn_ids = tokenizer.render_next_turn(retry.strip())

    @property
    def reply_length(self) -> int:
        """Number of tokens of the longest reply to an invalid action."""
        return max(len(self._retry_ids), len(self._retry_turn_ids or ()))

    def write_prompt(self, question: str) -> tuple[Message, ...]:
        """Return the instruction with the question, as one message of the user."""
        content = self._instruction.format(question=question, tools=self._tool_list)
        return (Message(role="user", content=content),)

    def check_prompt(self, messages: Sequence[Message]) -> str | None:
        """Return what a prompt lacks that never shows how to answer: no answer would ever be found."""
        if any(f"<{_ANSWER}>" in message.content for message in messages):
            return None
        return f"never says to answer between <{_ANSWER}> and </{_ANSWER}>"

    def render_prompt(self, question: Question) -> list[int]:
        """Return the ids of the chat prompt. Raises ConfigError when the chat template refuses it."""
        return self._tokenizer.render_prompt(question)

    def parse(self, ids: Sequence[int]) -> Action:
        """Return the action that stopped the turn, with its span and those of the closed thoughts before it.

        INVALID is: no closing tag, one that was not opened before, an empty argument. An empty answer is an
        answer (a wrong one). A span holds every token with at least one character of the stripped text, also
        when it shares that token with a tag.
        """
        text = self._tokenizer.decode(ids)

        def find_span(kind: SpanKind, start: int, end: int) -> Span:
            inner = text[start:end]
            start += len(inner) - len(inner.lstrip() or inner)
            first, last = find_token_span(
                ids, start, start + len(inner.strip()), text=text, decode=self._tokenizer.decode
            )
            return Span(kind=kind, start=first, end=last, text=inner.strip())

        # The first closing tag has stopped the turn; what it closes is the nearest opening one before it.
        closing = self._closing_tag.search(text)
        name = closing[1] if closing else ""
        end = closing.start() if closing else len(text)
        opened = text.rfind(f"<{name}>", 0, end)
        start = opened + len(f"<{name}>")
        is_valid = bool(name) and opened >= 0 and (name == _ANSWER or bool(text[start:end].strip()))
        # Thoughts end before the action: `<think> <answer> a </answer> </think>` is an answer, not a thought.
        thoughts = _THOUGHT.finditer(text, 0, opened if is_valid else end)
        spans = tuple(find_span(SpanKind.THINK, *thought.span(1)) for thought in thoughts)
        if not is_valid:
            return Action(kind=ActionKind.INVALID, spans=spans)
        if name == _ANSWER:
            return Action(kind=ActionKind.ANSWER, spans=(*spans, find_span(SpanKind.ANSWER, start, end)))
        query = find_span(SpanKind.QUERY, start, end)
        (parameter,) = self._tools[name].parameters
        call = ToolCall(tool=name, arguments={parameter: query.text})
        return Action(kind=ActionKind.TOOL, calls=(call,), spans=(*spans, query))

    def neutralize(self, text: str) -> str:
        """Return the text with a space after the `<` of every tag, as in `< /information>`.

        No page can then end its observation or act for the policy. Other text stays as it is.
        """
        return self._any_tag.sub("< ", text)

    def render_observations(
        self, calls: Sequence[ToolCall], observations: Sequence[Observation]
    ) -> list[int]:
        """Return the ids of the wrapped texts; the tool's text for it replaces an empty one."""
        texts = [
            found.text or self._tools[call.tool].empty_text
            for call, found in zip(calls, observations, strict=True)
        ]
        return self._tokenizer.encode("".join(self._observation.format(text=text) for text in texts))

    def render_retry(self, turn: Turn) -> list[int]:
        """Return the ids of the reply to an invalid action: a new turn when the policy has ended its own.

        It has when it stopped without a stop string, by an end-of-turn token.
        """
        text = self._tokenizer.decode(turn.output_ids.tolist())
        has_ended = turn.finish is Finish.STOP and not any(stop in text for stop in self.stop_strings)
        if not has_ended or self._retry_turn_ids is None:
            return self._retry_ids
        is_closed = bool(turn.output_ids[-1] == self._retry_turn_ids[0])
        return self._retry_turn_ids[1:] if is_closed else self._retry_turn_ids


def _find_wrapper(observation: str, *, actions: Sequence[str]) -> list[str]:
    """Return the names of the tags around an observation.

    Raises ConfigError for tags that are not closed in order, and for those of an action: a stop string.
    """
    before, _, after = observation.format(text="\0").partition("\0")
    opened, closed = ([found[0] for found in _TAG.finditer(part)] for part in (before, after))
    names = [tag[1:-1] for tag in opened]
    if closed != [f"</{name}>" for name in reversed(names)] or {*names} & {*actions}:
        raise ConfigError(
            f"data.prompt_file: search_r1.observation is {observation!r}, expected tags around {{text}} that "
            f"are opened before and closed after it, none of them {' or '.join(actions)}"
        )
    return names

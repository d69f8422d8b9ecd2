"""The tags of Search-R1: `<search> query </search>`, `<information>..</information>`, `<answer> a </answer>`.

Every tool with one argument has a tag of its name. The tags around an observation are those of the prompt
file. The packaged ones and the passage lines (`verl.agent.tools.search`) have the bytes of Search-R1's, so
that released checkpoints read what they were trained on; the other texts are worded by us.

Completions are read as `verl.agent.formats.tags` says. Search-R1 reads the same, with two exceptions: it also
searches for an empty query, and of a tag that was opened twice it reads from the first opening.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from verl.agent.formats.tags import ANSWER, TAG_NAMES, TAGS, TagReader, find_missing_tag, find_wrapper
from verl.agent.spans import DecodedText
from verl.errors import ConfigError
from verl.protocols import FixedText, Tokenizer
from verl.types import (
    Action,
    ActionKind,
    Finish,
    Message,
    Observation,
    Question,
    SpanKind,
    ToolCall,
    ToolSpec,
    Turn,
)


class SearchR1Format:
    """The prompt format `search_r1`."""

    name: ClassVar[str] = "search_r1"
    parts: ClassVar[tuple[SpanKind, ...]] = (SpanKind.THINK,)
    """What the policy writes in tags before its action."""
    tags: ClassVar[tuple[str, ...]] = TAGS
    texts: ClassVar[Mapping[str, FixedText]] = {
        "instruction": FixedText(required=("question",), optional=("tools",)),
        "instruction_for_tools": FixedText(required=("question", "tools")),
        "observation": FixedText(required=("text",)),
        "retry": FixedText(optional=("tools",)),
        "retry_for_tools": FixedText(required=("tools",)),
    }
    max_calls = 1
    ends_when_invalid = False

    def __init__(self, *, tokenizer: Tokenizer, texts: Mapping[str, str], tools: Sequence[ToolSpec]) -> None:
        """Raise ConfigError for a tool without exactly one argument, or a name that is another tag's."""
        names = [*(tool.name for tool in tools), ANSWER]
        self._observation = texts["observation"]
        wrapper = find_wrapper(self._observation, key=f"{self.name}.observation", actions=names)
        reserved = {*TAG_NAMES, *wrapper} - {"search"}
        for tool in tools:
            if len(tool.parameters) != 1 or tool.name in reserved:
                raise ConfigError(
                    f"agent.tools={tool.name} cannot be called with agent.format={self.name}, which passes "
                    f"one argument (it takes {len(tool.parameters)}) to a tool whose name is not that of "
                    "another tag; choose another format or leave the tool out"
                )
        self._tokenizer = tokenizer
        self._tools = {tool.name: tool for tool in tools}
        self._reader = TagReader(actions=names, parts=self.parts, others=wrapper)
        self.stop_strings = self._reader.stop_strings
        # The texts without a list of tools are worded for `search` alone.
        kind = "" if [*self._tools] == ["search"] else "_for_tools"
        self._instruction = texts[f"instruction{kind}"]
        self._tool_list = "\n".join(
            f"<{tool.name}> {parameter} </{tool.name}>: {tool.description}"
            for tool in tools
            for parameter in tool.parameters
        )
        self._retry = texts[f"retry{kind}"].format(tools=self._tool_list)

    @property
    def reply_length(self) -> int:
        """Return the number of tokens of the longest reply to an invalid action."""
        as_turn = self._tokenizer.render_next_turn(self._retry.strip()) or ()
        return max(len(self._tokenizer.encode(self._retry)), len(as_turn))

    def write_prompt(self, question: str) -> tuple[Message, ...]:
        """Return the instruction with the question, as one message of the user."""
        content = self._instruction.format(question=question, tools=self._tool_list)
        return (Message(role="user", content=content),)

    def check_prompt(self, messages: Sequence[Message]) -> str | None:
        """Return what a prompt lacks if it does not show how to answer, since no answer would be found."""
        return find_missing_tag(messages, [ANSWER, *(part for part in self.parts if part != SpanKind.THINK)])

    def render_prompt(self, question: Question) -> list[int]:
        """Return the ids of the chat prompt. Raises ConfigError when the chat template refuses it."""
        return self._tokenizer.render_prompt(question)

    def write_call(self, call: ToolCall) -> str:
        """Return how the policy writes a call."""
        (argument,) = call.arguments.values()
        return f"<{call.tool}> {argument} </{call.tool}>"

    def parse(self, ids: Sequence[int]) -> Action:
        """Return the action of a completion, with its span and those of the parts before it.

        INVALID is: no closing tag, one that was not opened before, an empty argument. An empty answer is an
        answer (a wrong one). A span holds every token with at least one character of the stripped text, also
        when it shares that token with a tag.
        """
        decoded = DecodedText(ids, decode=self._tokenizer.decode)
        action, parts = self._reader.read(decoded)
        is_answer = action.name == ANSWER
        kind = SpanKind.ANSWER if is_answer else SpanKind.QUERY
        span = decoded.make_span(kind, action.start, action.end, closing_end=action.closing_end)
        if is_answer:
            return Action(kind=ActionKind.ANSWER, spans=(*parts, span))
        if not span.text:
            return Action(kind=ActionKind.INVALID, spans=parts)
        (parameter,) = self._tools[action.name].parameters
        call = ToolCall(tool=action.name, arguments={parameter: span.text})
        return Action(kind=ActionKind.TOOL, calls=(call,), spans=(*parts, span))

    def neutralize(self, text: str) -> str:
        """Return the text with a space after the `<` of every tag, as in `< /information>`."""
        return self._reader.neutralize(text)

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
        ids = None
        if has_ended:
            ids = self._tokenizer.render_next_turn(self._retry.strip(), after=turn.output_ids.tolist())
        return self._tokenizer.encode(self._retry) if ids is None else ids

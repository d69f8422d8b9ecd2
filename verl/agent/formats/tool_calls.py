"""Tool calls in JSON, as chat models write them: `<tool_call>{"name": .., "arguments": {..}}</tool_call>`.

A system message lists the signatures of the tools, the message of the user is the question. The policy writes
`<think>..</think>` and then one tool call or `<answer> a </answer>`. The argument of a tool that has only one
is a string or a list of one to three: each is a call of its own. Results come back in a message of the role
`tool` where the chat template has one, else of the user, inside `<tool_response>`. Messages are appended to
what was sampled; nothing that came before is rendered again.

After an invalid call the policy reads what was wrong with it. IGPO (arXiv 2510.14967) uses a stricter form of
this, the format `igpo`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from verl.agent.formats.tags import ANSWER, TAGS, TOOL_CALL, TagReader, find_missing_tag, find_wrapper
from verl.agent.spans import DecodedText
from verl.protocols import FixedText, Tokenizer
from verl.types import (
    Action,
    ActionKind,
    Message,
    Observation,
    Question,
    Span,
    SpanKind,
    ToolCall,
    ToolSpec,
    Turn,
)

_PROBLEMS = ("no_action", "invalid_json", "unknown_tool", "wrong_arguments", "wrong_count")
"""What can be wrong with a completion, by the entry of the prompt file that says so."""
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\n\r]*")


class _InvalidCallError(Exception):
    """A tool call cannot be executed; the message is one of `_PROBLEMS`."""


class ToolCallsFormat:
    """The prompt format `tool_calls`."""

    name: ClassVar[str] = "tool_calls"
    names: ClassVar[Mapping[str, str]] = {}
    """Of tools, as the policy writes them, where that is not the tool's own."""
    opening: ClassVar[str] = ""
    """What the environment writes at the beginning of each turn of the policy."""
    tags: ClassVar[tuple[str, ...]] = TAGS
    texts: ClassVar[Mapping[str, FixedText]] = {
        "system": FixedText(required=("tools",)),
        "result": FixedText(required=("number", "text")),
        "observation": FixedText(required=("text",)),
        "retry": FixedText(required=("problem",)),
        **dict.fromkeys(_PROBLEMS, FixedText(optional=("tools",))),
    }
    max_calls = 3
    ends_when_invalid = False

    def __init__(self, *, tokenizer: Tokenizer, texts: Mapping[str, str], tools: Sequence[ToolSpec]) -> None:
        actions = (TOOL_CALL, ANSWER)
        wrapper = find_wrapper(texts["observation"], key=f"{self.name}.observation", actions=actions)
        self._tokenizer = tokenizer
        self._tools = {self.names.get(tool.name, tool.name): tool for tool in tools}
        self._empty_texts = {tool.name: tool.empty_text for tool in tools}
        self._texts = texts
        self._system = texts["system"].format(tools="\n".join(map(self._write_signature, tools)))
        self._reader = TagReader(actions=actions, others=["tools", *wrapper])
        self.stop_strings = self._reader.stop_strings
        names = ", ".join(self._tools)
        self._retries = {
            problem: texts["retry"].format(problem=texts[problem].format(tools=names))
            for problem in _PROBLEMS
        }

    @property
    def reply_length(self) -> int:
        """Return the number of tokens of the longest reply to an invalid action."""
        return max(len(self._write_message(text)) for text in self._retries.values())

    def write_prompt(self, question: str) -> tuple[Message, ...]:
        """Return the instruction with the signatures of the tools, and the question alone."""
        return Message(role="system", content=self._system), Message(role="user", content=question)

    def check_prompt(self, messages: Sequence[Message]) -> str | None:
        """Return which tag of the policy a prompt never shows: it would never write it."""
        return find_missing_tag(messages, [TOOL_CALL, ANSWER])

    def render_prompt(self, question: Question) -> list[int]:
        """Return the ids of the chat prompt. Raises ConfigError when the chat template refuses it."""
        return self._open_turn(self._tokenizer.render_prompt(question))

    def write_call(self, call: ToolCall) -> str:
        """Return how the policy writes a call."""
        written = {"name": self.names.get(call.tool, call.tool), "arguments": call.arguments}
        return f"<{TOOL_CALL}>{json.dumps(written, ensure_ascii=False)}</{TOOL_CALL}>"

    def parse(self, ids: Sequence[int]) -> Action:
        """Return the action of a completion, with its spans.

        INVALID is: no action, no JSON object with a name and arguments, an unknown tool, other arguments than
        it has or empty ones, more than `max_calls` queries. The span of a query is its characters inside the
        quotes as sampled; its text is without escapes.
        """
        action, _ = self._read(ids)
        return action

    def _read(self, ids: Sequence[int]) -> tuple[Action, str]:
        """Return the action of a completion, and what is wrong with it if that is INVALID."""
        decoded = DecodedText(ids, decode=self._tokenizer.decode)
        found, parts = self._reader.read(decoded)
        if found.name == ANSWER:
            answer = decoded.make_span(SpanKind.ANSWER, found.start, found.end, closing_end=found.closing_end)
            return Action(kind=ActionKind.ANSWER, spans=(*parts, answer)), ""
        if not found.name:
            return Action(kind=ActionKind.INVALID, spans=parts), "no_action"
        try:
            calls, queries = self._read_calls(decoded, found.start, found.end)
        except _InvalidCallError as problem:
            return Action(kind=ActionKind.INVALID, spans=parts), str(problem)
        return Action(kind=ActionKind.TOOL, calls=tuple(calls), spans=(*parts, *queries)), ""

    def _read_calls(self, decoded: DecodedText, start: int, end: int) -> tuple[list[ToolCall], list[Span]]:
        """Return the calls of the JSON text `[start, end)`, each with its query. Raises _InvalidCallError."""
        text = decoded.text[start:end]
        name, arguments = _read_call(text)
        if name not in self._tools:
            raise _InvalidCallError("unknown_tool")
        if arguments.keys() != self._tools[name].parameters.keys():
            raise _InvalidCallError("wrong_arguments")
        place = _find_values(text, 0)["arguments"]
        places = _find_values(text, place[0])
        if len(arguments) != 1:  # among several arguments models write numbers as numbers
            arguments = {key: _write_number(value) for key, value in arguments.items()}
        values = [*arguments.values()]
        if len(arguments) == 1 and isinstance(values[0], list):
            places = _find_values(text, places[next(iter(arguments))][0])
            values = values[0]
            if not 1 <= len(values) <= self.max_calls:
                raise _InvalidCallError("wrong_count")
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise _InvalidCallError("wrong_arguments")
        if len(arguments) != 1:
            query = decoded.make_span(SpanKind.QUERY, start + place[0], start + place[1])
            return [ToolCall(tool=self._tools[name].name, arguments=arguments)], [query]
        (parameter,) = arguments
        tool = self._tools[name].name
        calls = [ToolCall(tool=tool, arguments={parameter: value.strip()}) for value in values]
        queries: list[Span] = []
        for value, (first, last) in zip(values, places.values(), strict=True):
            query = decoded.make_span(SpanKind.QUERY, start + first + 1, start + last - 1, text=value.strip())
            # A token with characters of two queries belongs to the first.
            taken = queries[-1].end if queries else 0
            queries.append(replace(query, start=max(taken, query.start), end=max(taken, query.end)))
        return calls, queries

    def neutralize(self, text: str) -> str:
        """Return the text with a space after the `<` of every tag, as in `< /tool_response>`."""
        return self._reader.neutralize(text)

    def render_observations(
        self, calls: Sequence[ToolCall], observations: Sequence[Observation]
    ) -> list[int]:
        """Return the ids of one message with all results."""
        content = self._write_results(calls, observations)
        ids = self._tokenizer.render_next_turn(content, role="tool")
        if ids is None:
            return self._write_message(self._texts["observation"].format(text=content))
        return self._open_turn(ids)

    def _write_results(self, calls: Sequence[ToolCall], observations: Sequence[Observation]) -> str:
        """Return the text of all results, numbered if there are several."""
        shown = [
            found.text or self._empty_texts[call.tool]
            for call, found in zip(calls, observations, strict=True)
        ]
        if len(shown) > 1:
            result = self._texts["result"]
            shown = [result.format(number=number, text=text) for number, text in enumerate(shown, start=1)]
        return "\n".join(shown)

    def render_retry(self, turn: Turn) -> list[int]:
        """Return the ids of a message that says what was wrong with an invalid action."""
        # A policy that stopped without a tag has sampled the end of its turn itself.
        output_ids = turn.output_ids.tolist()
        _, problem = self._read(output_ids)
        return self._write_message(self._retries[problem], after=output_ids)

    def _write_message(self, text: str, *, after: Sequence[int] = ()) -> list[int]:
        """Return the ids of a message of the user; without a chat template, those of the text alone."""
        ids = self._tokenizer.render_next_turn(text.strip(), after=after)
        return self._open_turn(self._tokenizer.encode(text) if ids is None else ids)

    def _open_turn(self, ids: list[int]) -> list[int]:
        """Return ids before a turn, and with them the beginning of the turn that the policy must make."""
        if not self.opening or self._tokenizer.decode(ids).rstrip().endswith(self.opening):
            return ids
        return [*ids, *self._tokenizer.encode(self.opening)]

    def _write_signature(self, tool: ToolSpec) -> str:
        """Return the signature of a tool in JSON, as chat templates list functions."""
        kind: dict[str, object] = {"type": "string"}
        if len(tool.parameters) == 1:
            kind = {"type": "array", "items": kind, "minItems": 1, "maxItems": self.max_calls}
        parameters = {
            "type": "object",
            "properties": {name: kind | {"description": text} for name, text in tool.parameters.items()},
            "required": [*tool.parameters],
        }
        name = self.names.get(tool.name, tool.name)
        function = {"name": name, "description": tool.description, "parameters": parameters}
        return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


def _read_call(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a call in JSON. Raises _InvalidCallError, and nothing else."""
    try:
        call = _DECODER.decode(text)
        # Python reads infinite numbers and half characters (`"\\ud83d"`), which cannot be sent to a service.
        json.dumps(call, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        call = None
    match call:
        case {"name": str(name), "arguments": dict(arguments)}:
            return name, arguments
    raise _InvalidCallError("invalid_json")


def _write_number(value: object) -> object:
    """Return a whole number as text, everything else as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _find_values(text: str, start: int) -> dict[object, tuple[int, int]]:
    """Return the range of each value of a JSON object or array, by key or index.

    It begins at `start`, after blanks; `text` is valid JSON. Of equal keys the last one counts, as in Python.
    """
    start = _skip_blanks(text, start)
    found: dict[object, tuple[int, int]] = {}
    position = _skip_blanks(text, start + 1)
    while text[position] not in "]}":
        key: object = len(found)
        if text[start] == "{":
            key, position = _DECODER.raw_decode(text, position)
            position = _skip_blanks(text, _skip_blanks(text, position) + len(":"))
        _, end = _DECODER.raw_decode(text, position)
        found[key] = (position, end)
        position = _skip_blanks(text, end)
        if text[position] == ",":
            position = _skip_blanks(text, position + 1)
    return found


def _skip_blanks(text: str, start: int) -> int:
    match = _BLANKS.match(text, start)
    assert match is not None
    return match.end()

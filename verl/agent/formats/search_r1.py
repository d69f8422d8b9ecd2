"""The tags of Search-R1: `<search> query </search>`, `<information>..</information>`, `<answer> a </answer>`.

Every tool with one argument has a tag of its name. The observation wrapper of the packaged prompt file and
the passage lines (`verl.agent.tools.search`) have the bytes of Search-R1's, so that released checkpoints read
what they were trained on. The wording of the instruction, the reply to an invalid action and the text for an
empty result are ours.

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
from verl.types import Action, ActionKind, Finish, Message, Observation, Question, ToolSpec, Turn

# Those of this format besides its tools, and those of other formats that a policy may have been trained on.
_RESERVED = ("think", "information", "answer", "documents", "refine", "tool_call", "tool_response")
_TAG_NAMES = ("search", *_RESERVED)
_ANSWER = "answer"
_INVALID = Action(kind=ActionKind.INVALID)


class SearchR1Format:
    """The prompt format `search_r1`."""

    tags: ClassVar[tuple[str, ...]] = tuple(f"<{slash}{name}>" for name in _TAG_NAMES for slash in ("", "/"))
    texts: ClassVar[Mapping[str, FixedText]] = {
        "instruction": FixedText(required=("question",), optional=("tools",)),
        "observation": FixedText(required=("text",)),
        "nothing_found": FixedText(),
        "retry": FixedText(),
    }

    def __init__(self, *, tokenizer: Tokenizer, texts: Mapping[str, str], tools: Sequence[ToolSpec]) -> None:
        """Raise ConfigError for a tool that has not exactly one argument, or the name of another tag."""
        for tool in tools:
            if len(tool.parameters) != 1 or tool.name in _RESERVED:
                raise ConfigError(
                    f"agent.tools={tool.name} cannot be called with agent.format=search_r1, which passes one "
                    f"argument (it takes {len(tool.parameters)}) to a tool whose name is not that of another "
                    "tag; choose another format or leave the tool out"
                )
        self._tokenizer = tokenizer
        self._tools = {tool.name: tool for tool in tools}
        self._instruction = texts["instruction"]
        self._observation = texts["observation"]
        self._nothing_found = texts["nothing_found"].format()
        names = [*self._tools, _ANSWER]
        self.stop_strings = tuple(f"</{name}>" for name in names)
        self._closing_tag = re.compile(f"</({'|'.join(map(re.escape, names))})>")
        any_name = "|".join(map(re.escape, {*_TAG_NAMES, *self._tools}))
        self._any_tag = re.compile(rf"<(?=/?(?:{any_name})>)", re.IGNORECASE)
        retry = texts["retry"].format()
        self._retry_ids = tokenizer.encode(retry)
        self._retry_turn_ids = tokenizer.render_next_turn(retry.strip())

    @property
    def reply_length(self) -> int:
        """Number of tokens of the longest reply to an invalid action."""
        return max(len(self._retry_ids), len(self._retry_turn_ids or ()))

    def write_prompt(self, question: str) -> tuple[Message, ...]:
        """Return the instruction with the question, as one message of the user."""
        lines = [
            f"<{tool.name}> {parameter} </{tool.name}>: {tool.description}"
            for tool in self._tools.values()
            for parameter in tool.parameters
        ]
        content = self._instruction.format(question=question, tools="\n".join(lines))
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
        """Return the action that stopped the turn.

        INVALID is: no closing tag, one that was not opened before, an empty argument. An empty answer is an
        answer (a wrong one). The span holds every token with at least one character of the stripped text,
        also when it shares that token with a tag.
        """
        text = self._tokenizer.decode(ids)
        closing = self._closing_tag.search(text)
        if closing is None:
            return _INVALID
        name = closing[1]
        opened = text.rfind(f"<{name}>", 0, closing.start())
        inner = text[opened + len(f"<{name}>") : closing.start()]
        content = inner.strip()
        if opened < 0 or (name != _ANSWER and not content):
            return _INVALID
        start = closing.start() - len(inner.lstrip() or inner)
        first, last = find_token_span(
            ids, start, start + len(content), text=text, decode=self._tokenizer.decode
        )
        if name == _ANSWER:
            return Action(kind=ActionKind.ANSWER, text=content, start=first, end=last)
        (parameter,) = self._tools[name].parameters
        return Action(
            kind=ActionKind.TOOL,
            text=content,
            start=first,
            end=last,
            tool=name,
            arguments={parameter: content},
        )

    def neutralize(self, text: str) -> str:
        """Return the text with a space after the `<` of every tag, as in `< /information>`.

        No page can then end its observation or act for the policy. Other text stays as it is.
        """
        return self._any_tag.sub("< ", text)

    def render_observation(self, observation: Observation) -> list[int]:
        """Return the ids of the wrapped text, which says so when nothing was found."""
        text = self._observation.format(text=observation.text or self._nothing_found)
        return self._tokenizer.encode(text)

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

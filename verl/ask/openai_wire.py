"""OpenAI's chat completions, as far as an agent that searches by itself can give them.

The last message of the user is the question; earlier messages are accepted and not read, because the policy
was trained on single questions. What would change the answer and cannot be done is refused by name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.redaction import redact_text
from verl.ask.trace import Episode, Step, count_usage
from verl.types import Stop, Trajectory

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Parameters without effect here, and the values at which they have none."""
_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Parameters that concern the operator of an endpoint, and not the answer."""


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """Return the text of all parts."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "\n".join(part.text for part in parts)


class StreamOptions(BaseModel):
    """What a stream has besides the answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for an answer."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {"model": "policy", "messages": [{"role": "user", "content": "Where was Gilbert Nash born?"}]}
            ]
        },
    )

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0 is greedy; by default that of the server, which is 0."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Of each completion of the policy.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The same.")
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="The same seed samples the same answer."
    )
    max_turns: int | None = Field(
        default=None, ge=1, le=1000, description="Not OpenAI's: turns that may call tools."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_has_no_effect(cls, values: object) -> object:
        given = values if isinstance(values, dict) else {}
        for name, allowed in _NEUTRAL.items():
            value = given.get(name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name} is not supported here; leave it out")
        known = cls.model_fields.keys() | _NEUTRAL.keys() | _IGNORED
        if unknown := sorted(repr(name) for name in given.keys() - known if given[name] is not None):
            raise ValueError(f"{', '.join(unknown)[:200]}: not supported here; leave it out")
        return values

    @field_validator("messages")
    @classmethod
    def _require_question(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        question = next((message.text for message in reversed(messages) if message.role == "user"), "")
        if not question.strip():
            raise ValueError("the last message of the user is the question, and there is none with a text")
        question.encode("utf-8")  # raises ValueError for a lone surrogate, which no tokenizer reads
        return messages

    @property
    def question(self) -> str:
        """Return the text of the last message of the user."""
        return next(message.text for message in reversed(self.messages) if message.role == "user").strip()


class Writer:
    """Writes the answer to one request."""

    def __init__(self, model: str) -> None:
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(self, episode: Episode) -> dict[str, Any]:
        """Return the whole answer."""
        trajectory = episode.trajectory
        message = {
            "role": "assistant",
            "content": trajectory.answer,
            "refusal": None,
            "search_trace": list(episode.steps),
            "search_stop": str(trajectory.stop),
            **_gain_failure(episode),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(trajectory)}
            ],
            "usage": count_usage(trajectory),
        }

    def start(self) -> dict[str, Any]:
        """Return the first chunk of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def step(self, step: Step) -> dict[str, Any]:
        """Return the chunk of a turn; a later one of the same turn replaces it."""
        return self._chunk({"search_trace": [step]})

    def answer(self, text: str) -> dict[str, Any]:
        """Return the chunk of the answer."""
        return self._chunk({"content": text})

    def end(self, episode: Episode) -> list[dict[str, Any]]:
        """Return the chunks of turns that changed since they were sent, and of the end."""
        trajectory = episode.trajectory
        changed = [s for s in episode.steps if s["gain"] is not None or s["replacement_ids"]]
        chunks = [self.step(step) for step in changed]
        end = {"search_stop": str(trajectory.stop), **_gain_failure(episode)}
        return [*chunks, self._chunk(end, finish_reason=finish_reason(trajectory))]

    def usage(self, episode: Episode) -> dict[str, Any]:
        """Return the chunk that `stream_options.include_usage` asks for."""
        return {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": count_usage(episode.trajectory),
        }

    def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def _gain_failure(episode: Episode) -> dict[str, str]:
    """Return why the gains were not measured; nothing where they were, or were not asked for."""
    failure = episode.gain.failure
    return {} if failure is None else {"search_gain_failure": redact_text(failure)}


def finish_reason(trajectory: Trajectory) -> str:
    """Return `stop` for an answer, `length` where turns or context were used up before one."""
    return "stop" if trajectory.stop is Stop.ANSWERED else "length"

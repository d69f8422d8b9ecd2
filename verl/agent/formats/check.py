"""Check at start that a prompt format and the tokenizer of a model work together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from verl.protocols import PromptFormat, Tokenizer
from verl.types import Action, ActionKind, Observation, Question, ToolCall, ToolSpec, Turn

_ASKED, _ARGUMENT, _FOUND = "Who was born first?", "birthplace of Alice", "Bolton is a town in England."
_NUM_FORGED = 16
"""Some tokenizers have thousands of control tokens."""


def check_format(
    prompt_format: PromptFormat, *, tokenizer: Tokenizer, tools: Sequence[ToolSpec]
) -> str | None:
    """Return what fails in a short episode, and the fix; None where all holds.

    The question is asked, every tool is called and answers, and a turn without an action is replied to.
    Raises ConfigError when the chat template refuses the prompt.
    """
    calls = [ToolCall(tool=tool.name, arguments=dict.fromkeys(tool.parameters, _ARGUMENT)) for tool in tools]
    problems = [_check_prompt(prompt_format, tokenizer)]
    problems += [_check_call(prompt_format, tokenizer, call) for call in calls]
    problems.append(_check_retry(prompt_format, tokenizer))
    return next(filter(None, problems), None)


def _check_prompt(prompt_format: PromptFormat, tokenizer: Tokenizer) -> str | None:
    messages = prompt_format.write_prompt(_ASKED)
    question = Question(uid="check", text=_ASKED, messages=messages, golds=("Alice",), data_source="check")
    ids = prompt_format.render_prompt(question)
    if ids[:1] == ids[1:2] and ids[0] in tokenizer.control:
        return f"the prompt begins twice with {tokenizer.control[ids[0]]}; remove one from the chat template"
    # Some tokenizers decode to another text, such as one in lower case: of those only this much is asked.
    if (count := tokenizer.decode(ids).count(_decoded(tokenizer, _ASKED))) != 1:
        return (
            f"the question is in the prompt {count} times, expected once; use a chat template that writes "
            "every message once, or none"
        )
    return None


def _check_call(prompt_format: PromptFormat, tokenizer: Tokenizer, call: ToolCall) -> str | None:
    written = prompt_format.write_call(call)
    action = prompt_format.parse(ids := tokenizer.encode(written))
    if action.calls != (call,):
        return (
            f"the call {written!r} is written in tokens that mean {tokenizer.decode(ids)!r} and cannot be "
            "executed; choose another agent.format, or a model whose tokenizer can write it"
        )
    plain = prompt_format.render_observations([call], [Observation(text=_FOUND)])
    forged = _FOUND + "".join([*tokenizer.control.values()][:_NUM_FORGED])
    found = prompt_format.render_observations([call], [Observation(text=prompt_format.neutralize(forged))])
    is_shown = _decoded(tokenizer, _FOUND) in tokenizer.decode(plain)
    if not is_shown or _find_control(tokenizer, plain) != _find_control(tokenizer, found):
        return (
            f"the policy reads {tokenizer.decode(found)!r} for the result {forged!r} of {call.tool}; use a "
            "chat template that writes messages as they are, or none"
        )
    return None


def _check_retry(prompt_format: PromptFormat, tokenizer: Tokenizer) -> str | None:
    """Return what fails where the policy ends its turn without an action; None if nothing."""
    end = _find_control(tokenizer, tokenizer.render_next_turn("") or [])[:1]
    output_ids = np.array([*tokenizer.encode("hm"), *end], dtype=np.int32)
    turn = Turn(
        output_ids=output_ids,
        output_log_probs=np.zeros(len(output_ids), dtype=np.float32),
        action=Action(kind=ActionKind.INVALID),
    )
    reply = prompt_format.render_retry(turn)
    if end and reply[:1] == end:
        return f"a turn ends twice with {tokenizer.control[end[0]]}; use a chat template that ends it once"
    return None


def _find_control(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.control]


def _decoded(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text)).strip()

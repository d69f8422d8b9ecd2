"""Every text the environment writes: the instruction, search results, and the reply to an invalid action.

The formats are those of Search-R1, so that released checkpoints find what they were trained on. All functions
are pure and take structured passages: nothing here reads a transcript.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from serving.answers import complete_question
from verl.types import Passage, Trajectory

RETRY = (
    "\nMy previous action is invalid. To search, I must put the query between <search> and </search>. "
    "To answer, I must put the answer between <answer> and </answer>. Let me try again.\n"
)
NOTHING_FOUND = "Nothing was found for this query."

# The agent's own, and those of other formats that a policy may have been trained on.
_TAG_NAMES = ("think", "search", "information", "answer", "documents", "refine", "tool_call", "tool_response")
TAGS = tuple(f"<{slash}{name}>" for name in _TAG_NAMES for slash in ("", "/"))
_TAG = re.compile(rf"<(?=/?(?:{'|'.join(_TAG_NAMES)})>)", re.IGNORECASE)
_OPENING = "\n\n<information>"
_CLOSING = "</information>\n\n"

_INSTRUCTION = (
    "Answer the question below. Whenever you get new information, first reason about it between <think> and "
    "</think>. If you then find that you lack some knowledge, call the search engine with <search> query "
    "</search>; the best results come back between <information> and </information>. You can search as many "
    "times as you want. Once no further knowledge is needed, give the answer between <answer> and </answer> "
    "without detailed explanations, for example <answer> Beijing </answer>. Question: {question}\n"
)


def search_instruction(question: str) -> str:
    """The user message for a bare question; a missing question mark is added."""
    return _INSTRUCTION.format(question=complete_question(question))


def neutralize_tags(passage: Passage) -> Passage:
    """Put a space after the `<` of every agent tag in a passage, as in `< /information>`.

    No page can then end its observation or act for the policy. Other text stays as it is.
    """
    return replace(passage, title=_TAG.sub("< ", passage.title), text=_TAG.sub("< ", passage.text))


def render_passages(passages: Sequence[Passage]) -> str:
    """`Doc k(Title: title) text`, one line per passage, k from 1; the title may be empty."""
    lines = [f"Doc {k}(Title: {p.title}) {p.text}\n" for k, p in enumerate(passages, start=1)]
    return "".join(lines).strip()


def wrap_observation(documents: str) -> str:
    """What the policy reads after a search; says so when nothing was found."""
    return f"{_OPENING}{documents or NOTHING_FOUND}{_CLOSING}"


def render_context(trajectory: Trajectory) -> str:
    """All search results of a trajectory, one block per search: the context the IG service is asked with."""
    return "\n".join(render_passages(turn.passages) for turn in trajectory.turns if turn.passages)

"""References to compare an agent with: an answer without a search, and one from a single fixed search.

    no_search      prompt with the question -> answer
    one_shot_rag   prompt with the question and what the search engine finds for it -> answer

The model is asked once and cannot call tools. The passages of `one_shot_rag` are recorded like those of a
search, in a first turn in which nothing was sampled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from verl.agent.loop import call_tool, neutralize
from verl.forest import common_length
from verl.protocols import Agent, FixedText, PromptFormat, Tool
from verl.types import (
    Action,
    ActionKind,
    IntArray,
    Message,
    Observation,
    Question,
    Stop,
    ToolCall,
    Trajectory,
    Turn,
)

NO_SEARCH, ONE_SHOT_RAG = "no_search", "one_shot_rag"
REFERENCE_TEXTS: Mapping[str, FixedText] = {
    NO_SEARCH: FixedText(required=("question",)),
    ONE_SHOT_RAG: FixedText(required=("question", "passages")),
}
"""The section `references` of the prompt file."""


class ReferenceAgent:
    """Plays episodes of one completion; with a tool, what it finds is in the prompt."""

    def __init__(
        self,
        agent: Agent,
        *,
        prompt_format: PromptFormat,
        text: str,
        tool: Tool | None,
        max_obs_length: int,
    ) -> None:
        """Ask `agent` with `text` as the message of the user.

        What `tool` finds for the question takes at most `max_obs_length` tokens of it.
        """
        self._agent = agent
        self._format = prompt_format
        self._text = text
        self._tool = tool
        self._max_obs_length = max_obs_length

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        """Return the trajectory; FAILED if the search or the completion failed."""
        if self._tool is None:
            return await self._ask(question, "", sample=sample, seed=seed, greedy=greedy)
        started = time.monotonic()
        call = ToolCall(tool=self._tool.spec.name, arguments={"query": question.text})
        found = await call_tool(self._tool, call)
        if found.failure is not None:
            return Trajectory(
                question=question,
                sample=sample,
                prompt_ids=np.zeros(0, dtype=np.int32),
                turns=(),
                stop=Stop.FAILED,
                failure=f"{call.tool}_failed: {found.failure}",
                seconds=time.monotonic() - started,
            )
        shown = self._fit(self._tool, found, question)
        played = await self._ask(question, self._passages(shown), sample=sample, seed=seed, greedy=greedy)
        start = self._num_before_passages(question, played.prompt_ids)
        searched = Turn(
            output_ids=np.zeros(0, dtype=np.int32),
            output_log_probs=np.zeros(0, dtype=np.float32),
            action=Action(kind=ActionKind.TOOL, calls=(call,)),
            observations=(shown,),
            observation_ids=played.prompt_ids[start:],
            observation_truncated=shown.text != neutralize(found, self._format).text,
        )
        return replace(
            played,
            prompt_ids=played.prompt_ids[:start],
            turns=(searched, *played.turns),
            seconds=time.monotonic() - started,
        )

    async def _ask(
        self, question: Question, passages: str, *, sample: int, seed: int, greedy: bool
    ) -> Trajectory:
        asked = self._write(question, passages)
        played = await self._agent.run(asked, sample=sample, seed=seed, greedy=greedy)
        return replace(played, question=question)

    def _write(self, question: Question, passages: str) -> Question:
        """Return the question with the prompt of the reference."""
        content = self._text.format(question=question.text, passages=passages)
        return replace(question, messages=(Message(role="user", content=content),))

    def _render(self, question: Question, passages: str) -> list[int]:
        return self._format.render_prompt(self._write(question, passages))

    def _passages(self, shown: Observation) -> str:
        return shown.text or (self._tool.spec.empty_text if self._tool is not None else "")

    def _fit(self, tool: Tool, found: Observation, question: Question) -> Observation:
        """Return as much of what was found as fits, without markup of the format."""
        most = len(self._render(question, "")) + self._max_obs_length
        whole = neutralize(found, self._format)
        if len(self._render(question, whole.text)) <= most:
            return whole
        # The most characters that fit, by bisection.
        shown, low, high = tool.shorten(whole, 0), 0, len(whole.text) - 1
        while low < high:
            middle = (low + high + 1) // 2
            candidate = tool.shorten(whole, middle)
            if len(self._render(question, candidate.text)) <= most:
                low, shown = middle, candidate
            else:
                high = middle - 1
        return shown

    def _num_before_passages(self, question: Question, prompt_ids: IntArray) -> int:
        """Return how many tokens of the prompt are before the passages: those of a prompt without any."""
        return common_length(np.array(self._render(question, ""), dtype=np.int32), prompt_ids)

"""One episode: the policy writes, the environment answers, token in and token out.

    prompt -> [output -> observations] x max_turns -> last output, whose tool calls are not executed

Nothing that was sampled is ever decoded and encoded again, so the trained ids are the sampled ids plus the
injected ones. When the context is full the episode ends, or the oldest observations are replaced by a fixed
text (`agent.context`); each turn then records which ones. A failed tool call or completion ends the episode
as FAILED, with its name; the policy never reads the text of the error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from verl.errors import ConfigError, RolloutError
from verl.protocols import Generate, OnTurn, PromptFormat, Tool
from verl.types import (
    ActionKind,
    IntArray,
    Observation,
    Question,
    Sampling,
    Stop,
    ToolCall,
    Trajectory,
    Turn,
    join_context,
)

MAX_CHARS_PER_TOKEN = 16
"""Text beyond this many characters per token of room is cut before it is encoded. Text of any language has
fewer, so this limits the work for long observations and nothing else."""
_CACHED_PROMPTS = 1024


class _ToolFailureError(Exception):
    """A tool call failed; the message begins with the name of the failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """Sizes of an episode. Lengths are in tokens."""

    max_turns: int
    """Completions that are answered with an observation; one more completion follows."""
    max_start_length: int
    """Of the prompt."""
    max_prompt_length: int
    """Of the rolling context."""
    max_response_length: int
    """Of one completion."""
    max_obs_length: int
    """Of one observation."""
    temperature: float


class ToolAgent:
    """Plays episodes of `verl.protocols.Agent`; keeps nothing of them but the rendered prompts."""

    def __init__(
        self,
        *,
        generate: Generate,
        prompt_format: PromptFormat,
        tools: Sequence[Tool],
        limits: EpisodeLimits,
        dropped_text: str | None = None,
    ) -> None:
        """Put `dropped_text` for old observations in a full context; None: the episode ends there.

        Raises ConfigError when `max_obs_length` has no room for the fixed replies of the environment.
        """
        self._generate = generate
        self._format = prompt_format
        self._tools = {tool.spec.name: tool for tool in tools}
        self._limits = limits
        self._dropped_text = dropped_text
        # The samples of a group follow each other, so that its prompt is rendered once.
        self._render_prompt = lru_cache(_CACHED_PROMPTS)(lambda q: _as_ids(prompt_format.render_prompt(q)))
        lengths = [
            len(prompt_format.render_observations([call] * count, [Observation(text=text)] * count))
            for tool in tools
            for call, count in [(ToolCall(tool=tool.spec.name, arguments={}), prompt_format.max_calls)]
            for text in ("", tool.spec.shortest_text)
        ]
        if limits.max_obs_length < (shortest := max([prompt_format.reply_length, *lengths])):
            raise ConfigError(
                f"data.max_obs_length={limits.max_obs_length} cannot hold the fixed replies of the "
                f"environment: with this tokenizer it must be at least {shortest}"
            )

    async def run(
        self,
        question: Question,
        *,
        sample: int,
        seed: int,
        greedy: bool,
        on_turn: OnTurn = lambda number, turn: None,  # noqa: ARG005
    ) -> Trajectory:
        """Play one episode; the same seed and weights give the same one."""
        started = time.monotonic()
        prompt_ids = self._render_prompt(question)
        turns: list[Turn] = []
        failure = None
        try:
            stop = await self._play(prompt_ids, turns=turns, seed=seed, greedy=greedy, on_turn=on_turn)
        except _ToolFailureError as error:
            stop, failure = Stop.FAILED, str(error)
        except RolloutError as error:
            stop, failure = Stop.FAILED, f"generation_failed: {error}"
        return Trajectory(
            question=question,
            sample=sample,
            prompt_ids=prompt_ids,
            turns=tuple(turns),
            stop=stop,
            failure=failure,
            seconds=time.monotonic() - started,
        )

    async def _play(
        self,
        prompt_ids: IntArray,
        *,
        turns: list[Turn],
        seed: int,
        greedy: bool,
        on_turn: OnTurn,
    ) -> Stop:
        """Append the turns one by one and return why the episode ended; after the last nothing is read."""
        limits, context, num_dropped = self._limits, prompt_ids, 0
        if len(context) > limits.max_start_length:
            raise RolloutError(
                f"the prompt has {len(context)} tokens, data.max_start_length is {limits.max_start_length}"
            )
        # One completion more than tool calls: after the last result the policy can still answer.
        for number in range(limits.max_turns + 1):
            sampling = Sampling(
                temperature=0.0 if greedy else limits.temperature,
                max_tokens=limits.max_response_length,
                stop=self._format.stop_strings,
                seed=_turn_seed(seed, number),
            )
            completion = await self._generate.generate(context, sampling=sampling)
            turn = Turn(
                output_ids=completion.ids,
                output_log_probs=completion.log_probs,
                finish=completion.finish,
                action=self._format.parse(completion.ids.tolist()),
                num_dropped=num_dropped,
                version=completion.version,
            )
            # Before the reply, so that a tool that fails loses nothing of what was sampled.
            turns.append(turn)
            on_turn(number, turn)
            if turn.action.kind is ActionKind.ANSWER:
                return Stop.ANSWERED
            is_over = turn.action.kind is ActionKind.INVALID and self._format.ends_when_invalid
            if number == limits.max_turns or is_over:
                break
            turns[-1] = turn = await self._reply(turn)
            excess = len(context) + len(turn.output_ids) + len(turn.observation_ids)
            excess -= limits.max_prompt_length
            if excess > 0:
                room = self._make_room(turns, start=num_dropped, excess=excess)
                if room is None:  # the observations stay as facts that were not read
                    turns[-1] = replace(turn, observation_ids=_as_ids([]))
                    on_turn(number, turns[-1])
                    return Stop.LENGTH
                turns[:], num_dropped = room
            on_turn(number, turn)
            context = join_context(prompt_ids, turns, num_dropped=num_dropped)
        return Stop.BUDGET

    def _make_room(self, turns: Sequence[Turn], *, start: int, excess: int) -> tuple[list[Turn], int] | None:
        """Replace as few of the oldest observations as save `excess` tokens, from turn `start` on.

        Return the turns and how many of them, from the first on, are dropped. None when the context must not
        change, or when it has no room even without them. The newest observation is never replaced, nor are
        replies to invalid actions and observations shorter than their replacement.
        """
        if self._dropped_text is None:
            return None
        changed = list(turns)
        for number, turn in enumerate(turns[:-1]):
            if number < start or not turn.observations:
                continue
            fixed = [Observation(text=self._dropped_text)] * len(turn.observations)
            ids = _as_ids(self._format.render_observations(turn.action.calls, fixed))
            if len(ids) >= len(turn.observation_ids):
                continue
            changed[number] = replace(turn, replacement_ids=ids)
            excess -= len(turn.observation_ids) - len(ids)
            if excess <= 0:
                return changed, number + 1
        return None

    async def _reply(self, turn: Turn) -> Turn:
        """Return the same turn with the environment's reply. Raises _ToolFailureError."""
        calls = turn.action.calls
        if turn.action.kind is not ActionKind.TOOL:
            return replace(turn, observation_ids=_as_ids(self._format.render_retry(turn)))
        found = await asyncio.gather(*(call_tool(self._tools[call.tool], call) for call in calls))
        for call, observation in zip(calls, found, strict=True):
            if observation.failure is not None:
                raise _ToolFailureError(f"{call.tool}_failed: {observation.failure}")
        shown, ids, is_cut = self._fit(found, calls=calls)
        return replace(turn, observations=shown, observation_ids=_as_ids(ids), observation_truncated=is_cut)

    def _fit(
        self, found: Sequence[Observation], *, calls: Sequence[ToolCall]
    ) -> tuple[tuple[Observation, ...], list[int], bool]:
        """Return the observations as they are shown, their ids, at most `max_obs_length`, and if any was cut.

        What looks like markup of the format is neutralized. Where they do not fit, the tools shorten each to
        the same number of characters, the largest that fits. Rendering what is shown gives the ids again.
        """
        max_length = self._limits.max_obs_length

        def shorten(observations: Sequence[Observation], max_chars: int) -> tuple[Observation, ...]:
            return tuple(
                self._tools[call.tool].shorten(observation, max_chars)
                if len(observation.text) > max_chars
                else observation
                for call, observation in zip(calls, observations, strict=True)
            )

        # Before anything else, so that a result of any size costs the same work.
        limited = shorten(found, max_length * MAX_CHARS_PER_TOKEN)
        whole = tuple(neutralize(observation, self._format) for observation in limited)
        is_cut = limited != tuple(found)
        if not is_cut and len(ids := self._format.render_observations(calls, whole)) <= max_length:
            return whole, ids, False
        # The most characters that fit, by bisection; that none at all fit was checked at the start.
        shown = shorten(whole, 0)
        ids = self._format.render_observations(calls, shown)
        low, high = 0, max(len(observation.text) for observation in whole)
        while low < high:
            middle = (low + high + 1) // 2
            candidate = shorten(whole, middle)
            candidate_ids = self._format.render_observations(calls, candidate)
            if len(candidate_ids) <= max_length:
                low, shown, ids = middle, candidate, candidate_ids
            else:
                high = middle - 1
        return shown, ids, True


def neutralize(observation: Observation, prompt_format: PromptFormat) -> Observation:
    """Return the observation without markup of the format in its text and passages."""
    clean = prompt_format.neutralize
    passages = tuple(
        replace(passage, id=clean(passage.id), title=clean(passage.title), text=clean(passage.text))
        for passage in observation.passages
    )
    return replace(observation, text=clean(observation.text), passages=passages)


async def call_tool(tool: Tool, call: ToolCall) -> Observation:
    """Return what the tool returned, or a failure when it did not return in time."""
    timeout_s = tool.spec.timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await tool.call(call.arguments, deadline=time.monotonic() + timeout_s)
    except TimeoutError:
        return Observation(failure=f"no answer within {timeout_s:g} s")


def _turn_seed(seed: int, turn: int) -> int:
    """Return a seed of its own for every turn, the same in every process (63 bits)."""
    return int(np.random.SeedSequence((seed, turn)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _as_ids(ids: Sequence[int]) -> IntArray:
    return np.array(ids, dtype=np.int32)

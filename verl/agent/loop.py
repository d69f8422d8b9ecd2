"""One episode: the policy writes, the environment answers, token in and token out.

    prompt -> [output -> observation] x max_turns -> last output, whose search is not executed

Nothing that was sampled is ever decoded and encoded again, so the trained ids are the sampled ids plus the
injected ones. A failed search or completion ends the episode as FAILED, with its name; the text of an error
is never evidence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from verl.agent.actions import STOP_STRINGS, parse_action
from verl.agent.prompts import RETRY, neutralize_tags, render_passages, wrap_observation
from verl.errors import ConfigError, RolloutError, ServiceError
from verl.protocols import Generate, Search, Tokenizer
from verl.types import (
    ActionKind,
    Completion,
    Finish,
    IntArray,
    Passage,
    Question,
    Sampling,
    Stop,
    Trajectory,
    Turn,
)

_MAX_CHARS_PER_TOKEN = 16
"""Text beyond this many characters per token of room is cut before it is encoded. Text of any language has
fewer, so this limits the work for long passages and nothing else."""


class SearchAgent:
    """Plays episodes of `verl.protocols.Agent`; keeps no state between them."""

    def __init__(
        self,
        *,
        generate: Generate,
        search: Search,
        tokenizer: Tokenizer,
        max_turns: int,
        max_start_length: int,
        max_prompt_length: int,
        max_response_length: int,
        max_obs_length: int,
        temperature: float,
    ) -> None:
        """Lengths are in tokens: of the prompt, of the rolling context, of one output, of one observation."""
        self._generate = generate
        self._search = search
        self._tokenizer = tokenizer
        self._max_turns = max_turns
        self._max_start_length = max_start_length
        self._max_prompt_length = max_prompt_length
        self._max_response_length = max_response_length
        self._max_obs_length = max_obs_length
        self._temperature = temperature
        self._retry_ids = _as_ids(tokenizer.encode(RETRY))
        bare = render_passages([Passage(id="", title="", text="", score=0.0)])
        next_turn = tokenizer.render_next_turn(RETRY.strip())
        self._retry_turn_ids = None if next_turn is None else _as_ids(next_turn)
        replies = [tokenizer.encode(wrap_observation(text)) for text in ("", bare)]
        shortest = max(map(len, (self._retry_ids, next_turn or (), *replies)))
        if max_obs_length < shortest:
            raise ConfigError(
                f"data.max_obs_length={max_obs_length} cannot hold the fixed replies of the environment: "
                f"with this tokenizer it must be at least {shortest}"
            )

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        """Play one episode; the same seed and weights give the same one."""
        started = time.monotonic()
        prompt_ids = _as_ids(self._tokenizer.render_prompt(question))
        turns: list[Turn] = []
        failure = None
        try:
            stop = await self._play(prompt_ids, turns=turns, session=question.uid, seed=seed, greedy=greedy)
        except ServiceError as error:
            stop, failure = Stop.FAILED, f"search_failed: {error}"
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
        self, context: IntArray, *, turns: list[Turn], session: str, seed: int, greedy: bool
    ) -> Stop:
        """Append the turns one by one and say why the episode ended; the last turn has no observation."""
        if len(context) > self._max_start_length:
            raise RolloutError(
                f"the prompt has {len(context)} tokens, data.max_start_length is {self._max_start_length}"
            )
        for number in range(self._max_turns + 1):
            sampling = Sampling(
                temperature=0.0 if greedy else self._temperature,
                max_tokens=self._max_response_length,
                stop=STOP_STRINGS,
                seed=_turn_seed(seed, number),
            )
            completion = await self._generate.generate(context, sampling=sampling, session=session)
            turn = self._read(completion)
            turns.append(turn)
            if turn.action.kind is ActionKind.ANSWER:
                return Stop.ANSWERED
            if number == self._max_turns:
                break
            turn = await self._observe(turn, finish=completion.finish)
            context = np.concatenate([context, turn.output_ids, turn.observation_ids])
            if len(context) > self._max_prompt_length:
                return Stop.LENGTH
            turns[-1] = turn
        return Stop.BUDGET

    def _read(self, completion: Completion) -> Turn:
        return Turn(
            output_ids=completion.ids,
            output_log_probs=completion.log_probs,
            action=parse_action(completion.ids.tolist(), decode=self._tokenizer.decode),
            passages=(),
            observation_ids=_as_ids([]),
            version=completion.version,
        )

    def _retry(self, output_ids: IntArray, *, finish: Finish) -> IntArray:
        """Return the reply to an invalid action: a new turn when the policy has ended its own.

        It has when it stopped without a stop string, by an end-of-turn token.
        """
        text = self._tokenizer.decode(output_ids.tolist())
        has_ended = finish is Finish.STOP and not any(stop in text for stop in STOP_STRINGS)
        if not has_ended or self._retry_turn_ids is None:
            return self._retry_ids
        is_closed = bool(output_ids[-1] == self._retry_turn_ids[0])
        return self._retry_turn_ids[1:] if is_closed else self._retry_turn_ids

    async def _observe(self, turn: Turn, *, finish: Finish) -> Turn:
        """The same turn with the environment's reply. Raises ServiceError."""
        if turn.action.kind is not ActionKind.SEARCH:
            return replace(turn, observation_ids=self._retry(turn.output_ids, finish=finish))
        max_chars = self._max_obs_length * _MAX_CHARS_PER_TOKEN
        found = tuple(
            neutralize_tags(replace(passage, title=passage.title[:max_chars], text=passage.text[:max_chars]))
            for passage in await self._search.search(turn.action.text)
        )
        shown, ids = _fit_observation(
            found, encode=self._tokenizer.encode, max_length=self._max_obs_length, max_chars=max_chars
        )
        return replace(
            turn, passages=shown, observation_ids=_as_ids(ids), observation_truncated=shown != found
        )


def _fit_observation(
    passages: tuple[Passage, ...], *, encode: Callable[[str], list[int]], max_length: int, max_chars: int
) -> tuple[tuple[Passage, ...], list[int]]:
    """Return the passages as they are shown and the ids of their observation, at most `max_length`.

    Documents that do not fit or have more than `max_chars` characters are cut from their end: the last
    passage keeps the text that is left of it, and one of which only the heading would be left is dropped. The
    first one is never dropped: its title is cut instead. Rendering the shown passages gives the text of the
    ids again.
    """
    documents = render_passages(passages)
    if len(documents) <= max_chars:
        ids = encode(wrap_observation(documents))
        if len(ids) <= max_length:
            return passages, ids
    low, high = 0, min(len(documents), max_chars)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(encode(wrap_observation(documents[:middle].rstrip()))) <= max_length
        low, high = (middle, high) if fits else (low, middle - 1)
    # More text is nearly always more tokens; where a tokenizer breaks that rule, give up characters.
    while True:
        shown = _shown_passages(documents[:low], passages=passages)
        ids = encode(wrap_observation(render_passages(shown)))
        if len(ids) <= max_length:
            return shown, ids
        low -= 1


def _shown_passages(documents: str, *, passages: Sequence[Passage]) -> tuple[Passage, ...]:
    """Return what can be read in the start of the rendered passages, at least part of the first one."""
    for count in range(len(passages), 0, -1):
        bare = replace(passages[count - 1], text="")
        heading = render_passages([*passages[: count - 1], bare])
        if len(documents.rstrip()) > len(heading):
            whole = render_passages(passages[:count])
            text = documents[: len(whole)].rstrip()[len(heading) + 1 :]
            return (*passages[: count - 1], replace(bare, text=text))
    first = passages[0]
    start = len(render_passages([replace(first, title="", text="")])) - 1
    return (replace(first, title=documents[start : start + len(first.title)], text=""),)


def _turn_seed(seed: int, turn: int) -> int:
    """A seed of its own for every turn, the same in every process (63 bits)."""
    return int(np.random.SeedSequence((seed, turn)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _as_ids(ids: Sequence[int]) -> IntArray:
    return np.array(ids, dtype=np.int32)

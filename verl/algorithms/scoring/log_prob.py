"""Log-probs of answers in the states of a trajectory: what the policy scores, and how it is reduced.

A state is what the policy had read when it began a turn: the prompt, or all up to the observation of the turn
before. An answer is appended to it inside a wrapper, such as `<answer>{answer}</answer>`, and the tokens that
hold a character of the answer (or of the tags around it, too) are scored.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import numpy as np

from verl.agent.spans import THINK_TAG, DecodedText, opens_thought
from verl.algorithms.base import LogProbScorer, Measurement, TextCodec
from verl.branches import Branch, Tree, TreeLogProbs
from verl.trainer.config.schema import ANSWER_PLACE
from verl.types import FloatArray, Gain, Group, IntArray, Stop, Trajectory

_MAX_PROBES = 100_000
"""Encoded answers that are kept: SIOP scores what the policy writes, new answers in every step."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """An answer in its wrapper, as tokens."""

    ids: IntArray
    """Up to the last scored token: nothing after it changes a log-prob."""
    scored: tuple[int, int]


class AnswerProbes:
    """Encodes answers in a wrapper; every answer once.

    Where a prompt ends with `<think>`, as with some chat templates, the wrapper's own is left out.
    """

    def __init__(self, codec: TextCodec | None, wrapper: str, *, with_tag: bool = False) -> None:
        """Take `wrapper`, which has the answer's place in it; `with_tag` scores the tags around it, too.

        Raises ValueError for a wrapper without a place.
        """
        assert codec is not None  # the trainer hands it to every method that needs log-probs
        if wrapper.count(ANSWER_PLACE) != 1:
            raise ValueError(f"the wrapper {wrapper!r} must have {ANSWER_PLACE} in it once")
        self._codec = codec
        self._wrapper = wrapper
        self._with_tag = with_tag
        self._encode = lru_cache(_MAX_PROBES)(self._encode_uncached)

    def encode_all(self, answers: Sequence[str], *, trajectory: Trajectory) -> list[Probe]:
        """Return the tokens, in the wrapper, of those answers that have any."""
        is_opened = opens_thought(trajectory.prompt_ids, decode=self._codec.decode)
        return [probe for answer in answers if (probe := self._encode(answer, is_opened)) is not None]

    def _encode_uncached(self, answer: str, is_opened: bool) -> Probe | None:
        wrapper = self._wrapper.removeprefix(THINK_TAG) if is_opened else self._wrapper
        before, after = wrapper.split(ANSWER_PLACE)
        # Encoded together with its wrapper, because a tokenizer may merge characters over the border.
        ids = self._codec.encode(before + answer + after)
        decoded = DecodedText(ids, decode=self._codec.decode)
        text = decoded.text
        # Tokenizers may normalize: Qwen's encode "e" and a combining accent as one character.
        forms = (answer, *(unicodedata.normalize(form, answer) for form in ("NFC", "NFKC")))
        places = ((text.find(form, max(0, len(before) - 1)), len(form)) for form in forms)
        found = next(((first, first + length) for first, length in places if first >= 0), None)
        if not answer.strip() or found is None:
            return None
        start, end = found
        if self._with_tag:
            # From the last tag before the answer on; a thought before it says nothing about the answer.
            start, end = max(0, text.rfind("<", 0, start)), len(text)
        span = decoded.find_tokens(start, end)
        return Probe(ids=np.array(ids[: span[1]], dtype=np.int32), scored=span)


def has_changed(trajectory: Trajectory) -> bool:
    """Return whether there is a turn before the last one: only those change what the policy has read."""
    return len(trajectory.turns) > 1


def state_lengths(trajectory: Trajectory) -> list[int]:
    """Return the number of tokens of the state before each turn; the first is that of the prompt."""
    lengths = [len(trajectory.prompt_ids)]
    for turn in trajectory.turns[:-1]:
        lengths.append(lengths[-1] + len(turn.output_ids) + len(turn.observation_ids))
    return lengths


def all_states(trajectory: Trajectory) -> Sequence[int]:
    """Return the index of every state: that before each turn."""
    return range(len(trajectory.turns))


def answers_in_states(
    trajectory: Trajectory, probes: Sequence[Probe], *, states: Sequence[int]
) -> list[Branch]:
    """Return the branches of all probes in the first of `states`, then those in the next."""
    lengths = state_lengths(trajectory)
    return [
        Branch(ids=probe.ids, start=lengths[state], scored=probe.scored)
        for state in states
        for probe in probes
    ]


async def measure_states(
    groups: Sequence[Group],
    probes: Callable[[Trajectory], Sequence[Probe] | None],
    *,
    scorer: LogProbScorer,
    states: Callable[[Trajectory], Sequence[int]] = all_states,
    reduce: Callable[[FloatArray], float],
    turns: Callable[[Trajectory, list[list[float]]], Sequence[float | None]],
) -> Measurement:
    """Measure the gains of turns from the log-probs of answers in the states of each trajectory.

    `probes` returns the answers of a trajectory, None where nothing is to be measured, as with a single turn
    (see `has_changed`), and `states` the states to score them in. `reduce` makes a number of the log-probs of
    an answer's tokens, and `turns` makes the gains, one per turn, of these numbers [states, answers]. A
    trajectory that failed has no gain; one without an answer that has tokens of its own is a failed
    measurement.
    """
    asked = [
        [probes(t) if t.stop is not Stop.FAILED and t.turns else None for t in group.trajectories]
        for group in groups
    ]
    branches = [
        [
            answers_in_states(t, of_one, states=states(t)) if of_one else []
            for t, of_one in zip(group.trajectories, of_group, strict=True)
        ]
        for group, of_group in zip(groups, asked, strict=True)
    ]
    results, old = await score_branches(groups, branches, scorer=scorer)

    def gain(trajectory: Trajectory, of_one: Sequence[Probe] | None, result: TreeLogProbs) -> Gain:
        if of_one is None:
            return Gain()
        if not of_one:
            return Gain(failure="gain_failed: no answer has a token of its own")
        values = [float(reduce(of_branch.astype(np.float64))) for of_branch in result.branches]
        by_state = [values[i : i + len(of_one)] for i in range(0, len(values), len(of_one))]
        return Gain(turns=tuple(turns(trajectory, by_state)))

    gains = [
        [
            gain(trajectory, of_one, result)
            for trajectory, of_one, result in zip(group.trajectories, of_group, of_results, strict=True)
        ]
        for group, of_group, of_results in zip(groups, asked, results, strict=True)
    ]
    return Measurement(gains=gains, stats=answer_stats(results), old_log_probs=old)


def answer_stats(results: Sequence[Sequence[TreeLogProbs]]) -> dict[str, float]:
    """Return the mean log-prob per token of the likeliest answer of each trajectory, over trajectories.

    It shows whether the policy would ever write an answer in the text around it.
    """
    scored = [
        [float(of_branch.mean()) for of_branch in result.branches]
        for of_group in results
        for result in of_group
    ]
    best = [max(values) for values in scored if values]
    return {"ig/answer_log_prob_mean": fmean(best)} if best else {}


async def score_branches(
    groups: Sequence[Group], branches: Sequence[Sequence[Sequence[Branch]]], *, scorer: LogProbScorer
) -> tuple[list[list[TreeLogProbs]], list[list[FloatArray]] | None]:
    """Return the log-probs of the branches of every trajectory, and those of its sampled tokens if needed."""
    trees = [
        make_tree(trajectory, of_one, scorer=scorer)
        for group, of_group in zip(groups, branches, strict=True)
        for trajectory, of_one in zip(group.trajectories, of_group, strict=True)
    ]
    answers = iter(await scorer.score(trees))
    results = [[next(answers) for _ in group.trajectories] for group in groups]
    if not scorer.scores_trajectories:
        return results, None
    return results, [[_whole_trunk(result) for result in of_group] for of_group in results]


def _whole_trunk(result: TreeLogProbs) -> FloatArray:
    assert result.trunk is not None
    return result.trunk


def make_tree(trajectory: Trajectory, branches: Sequence[Branch], *, scorer: LogProbScorer) -> Tree:
    """Return the tree of a trajectory; with its sampled tokens, if the update needs their log-probs."""
    return Tree(
        trunk=trajectory.token_ids,
        branches=tuple(branches),
        trunk_scored=trajectory.policy_mask if scorer.scores_trajectories else None,
        prompt_length=len(trajectory.prompt_ids),
    )

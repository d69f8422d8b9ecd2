"""IG-Search: each query is rewarded by what its documents say about the gold answer (arXiv 2604.15148).

The gain of a step is the mean log-prob per token of the gold answer with the step's documents (and what the
policy made of them, `<refine>`), minus its mean over N counterfactual ones that other questions of the batch
received. It is stabilized and added to the advantage of the tokens of that query alone, divided by their
number, so that a group in which every answer is wrong still has a gradient on its queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean
from zlib import crc32

import numpy as np

from verl.algorithms.base import Algorithm, Measurement, Need, Prefetch, Services
from verl.algorithms.scoring.log_prob import (
    AnswerProbes,
    Probe,
    answer_stats,
    score_branches,
)
from verl.algorithms.statistics import credit_outcomes, gains_of_turns, spread_spans
from verl.branches import Branch, TreeLogProbs
from verl.trainer.config.fields import not_negative, one_of, positive, share
from verl.trainer.config.schema import OutcomeConfig
from verl.types import Credit, FloatArray, Gain, Group, IntArray, Score, SpanKind, Stop, Trajectory


@dataclass
class IGSearchConfig(OutcomeConfig):
    """Settings of `algorithm=ig_search`. The paper gives `gain_weight` and `num_counterfactuals`."""

    name: str = "ig_search"
    gain_weight: float = not_negative(0.3)
    """alpha."""
    num_counterfactuals: int = positive(3)
    """N."""
    token_weights: str = one_of("uniform", "head_weighted")
    """`head_weighted`: the first `num_head_tokens` tokens of the answer count `head_weight` times as much."""
    num_head_tokens: int = positive(3)
    head_weight: float = positive(3.0)
    dead_zone: float = not_negative(0.05)
    """delta; the value is ours."""
    negative_scale: float = share(0.5)
    """lambda; the value is ours."""
    clip: float = positive(1.0)
    """eta: gains come out in (-eta, eta); value and function, eta * tanh(x / eta), are ours."""
    min_document_chars: int = not_negative(10)
    """A step whose documents are shorter gets no gain and is no counterfactual of others."""
    answers: str = one_of("first", "best")
    seed: int = not_negative(0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A search of a trajectory and what the policy read and made of its results."""

    key: tuple[str, int, int]
    """Question, sample and turn."""
    query_end: int
    """Tokens of the trajectory up to the search, the results excluded."""
    end: int
    """Tokens of the trajectory up to the end of the results and of what the policy made of them."""
    ids: IntArray
    """The tokens between: results and refinement."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What the policy scores for one trajectory."""

    steps: list[Step]
    draws: list[list[Step]]
    """Counterfactual steps of each step; empty where there are none."""
    probes: list[Probe]
    """The gold answers that are scored."""


class IGSearch(Algorithm):
    """Reward a trajectory by its outcome, and the tokens of each query by the gain of its documents."""

    settings: IGSearchConfig
    settings_class = IGSearchConfig
    needs = frozenset({Need.POLICY_LOG_PROBS})
    outcome = "autorefine_f1"
    format = "autorefine"
    answer_wrapper = "\n<answer> {answer}"

    def __init__(self, settings: IGSearchConfig, services: Services) -> None:
        super().__init__(settings, services)
        self._probes = AnswerProbes(services.codec, services.answer_wrapper)

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Measure the gain of every search, real and counterfactual documents in one pass per trajectory."""
        assert self.services.policy is not None
        settings = self.settings
        steps = [
            [find_steps(t, min_chars=settings.min_document_chars) for t in group.trajectories]
            for group in groups
        ]
        pool = sorted(
            (step for of_group in steps for some in of_group for step in some), key=attrgetter("key")
        )
        count = None if settings.answers == "best" else 1
        asked = [
            [
                Asked(
                    steps=some,
                    draws=[self._draw(step, pool) for step in some],
                    probes=self._probes.encode_all(group.question.golds[:count], trajectory=trajectory),
                )
                for trajectory, some in zip(group.trajectories, of_group, strict=True)
            ]
            for group, of_group in zip(groups, steps, strict=True)
        ]
        branches = [[_branches(of_one) for of_one in of_group] for of_group in asked]
        results, old = await score_branches(groups, branches, scorer=self.services.policy)
        measured = [
            [self._gain(*parts) for parts in zip(group.trajectories, of_group, of_results, strict=True)]
            for group, of_group, of_results in zip(groups, asked, results, strict=True)
        ]
        gains = [[gain for gain, _ in of_group] for of_group in measured]
        pairs = [pair for of_group in measured for _, some in of_group for pair in some]
        return Measurement(
            gains=gains, stats={**answer_stats(results), **_log_prob_stats(pairs)}, old_log_probs=old
        )

    def credit(
        self,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Score]],
        *,
        progress: float = 0.0,
    ) -> list[list[Credit]]:
        """Credit the outcome as GRPO does, and on top of it each query with its stabilized gain."""
        outcomes = credit_outcomes(groups, scores, settings=self.settings)
        return [
            [self._credit(*parts) for parts in zip(group.trajectories, of_group, of_outcomes, strict=True)]
            for group, of_group, of_outcomes in zip(groups, scores, outcomes, strict=True)
        ]

    def _credit(self, trajectory: Trajectory, score: Score, outcome: Credit) -> Credit:
        if score.failure is not None:
            return outcome
        gains = gains_of_turns(trajectory, score)
        stable = tuple(None if gain is None else stabilize(gain, self.settings) for gain in gains)
        lengths = [
            sum(span.end - span.start for span in turn.action.spans if span.kind is SpanKind.QUERY)
            for turn in trajectory.turns
        ]
        bonus = [query_bonus(g, n, self.settings) for g, n in zip(stable, lengths, strict=True)]
        return Credit(
            advantages=outcome.advantages + spread_spans(trajectory, bonus, kinds={SpanKind.QUERY}),
            components={**outcome.components, "gain": score.gain.turns or None, "query_gain": stable},
        )

    def _draw(self, step: Step, pool: Sequence[Step]) -> list[Step]:
        """Return N steps of other questions: without replacement where there are as many, none without any.

        The draw depends on the step, the seed and the pool alone, not on the order of the batch.
        """
        others = [
            other for other in pool if other.key[0] != step.key[0] and not np.array_equal(other.ids, step.ids)
        ]
        if not others:
            return []
        count = self.settings.num_counterfactuals
        rng = np.random.default_rng([self.settings.seed, crc32(repr(step.key).encode())])
        chosen = rng.choice(len(others), size=count, replace=len(others) < count)
        return [others[i] for i in chosen]

    def _gain(
        self, trajectory: Trajectory, asked: Asked, result: TreeLogProbs
    ) -> tuple[Gain, list[tuple[float, float]]]:
        """Return the gains of the turns, and the real and mean counterfactual log-prob of each step."""
        num_probes = len(asked.probes)
        if asked.steps and not num_probes:
            return Gain(failure="gain_failed: no gold answer has a token of its own"), []
        values = iter([mean_log_prob(part, self.settings) for part in result.branches])
        turns: list[float | None] = [None] * len(trajectory.turns)
        pairs = []
        for step, drawn in zip(asked.steps, asked.draws, strict=True):
            if not drawn:
                continue
            real = [next(values) for _ in range(num_probes)]
            best = real.index(max(real))  # the same answer for the documents and their counterfactuals
            random = [[next(values) for _ in range(num_probes)][best] for _ in drawn]
            turns[step.key[2]] = step_gain(real[best], random)
            pairs.append((real[best], fmean(random)))
        return Gain(turns=tuple(turns)), pairs


def find_steps(trajectory: Trajectory, *, min_chars: int) -> list[Step]:
    """Return the searches of a trajectory whose results, as read, have at least `min_chars` characters.

    Turns without passages, such as those of the tool `python`, do not count: the policy chooses what its
    code prints.
    """
    if trajectory.stop is Stop.FAILED:
        return []
    steps = []
    ids = trajectory.token_ids
    start = len(trajectory.prompt_ids)
    for number, turn in enumerate(trajectory.turns):
        query_end = start + len(turn.output_ids)
        start = query_end + len(turn.observation_ids)
        num_chars = sum(len(observation.text) for observation in turn.observations)
        if not turn.passages or num_chars < max(1, min_chars):
            continue
        following = trajectory.turns[number + 1 : number + 2]
        refined = [
            span.outer_end
            for later in following
            for span in later.action.spans
            if span.kind is SpanKind.REFINE
        ]
        end = start + max(refined, default=0)
        steps.append(
            Step(
                key=(trajectory.question.uid, trajectory.sample, number),
                query_end=query_end,
                end=end,
                ids=ids[query_end:end],
            )
        )
    return steps


def _branches(asked: Asked) -> list[Branch]:
    """Return per step the answers after its own results, then after those of each counterfactual."""
    branches: list[Branch] = []
    for step, drawn in zip(asked.steps, asked.draws, strict=True):
        if not drawn:
            continue
        branches += [Branch(ids=p.ids, start=step.end, scored=p.scored) for p in asked.probes]
        for other in drawn:
            branches += [_after_documents(probe, step, other) for probe in asked.probes]
    return branches


def _after_documents(probe: Probe, step: Step, other: Step) -> Branch:
    """Return an answer after the search of `step` and the results of another."""
    first, end = (len(other.ids) + place for place in probe.scored)
    ids = np.concatenate([other.ids, probe.ids])
    return Branch(ids=ids, start=step.query_end, scored=(first, end))


def _log_prob_stats(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    if not pairs:
        return {}
    return {
        "ig/log_prob_real_mean": fmean(real for real, _ in pairs),
        "ig/log_prob_counterfactual_mean": fmean(other for _, other in pairs),
    }


def mean_log_prob(log_probs: FloatArray, settings: IGSearchConfig) -> float:
    """Return the weighted mean log-prob of the tokens of an answer; weights have mean 1 (eq. 3)."""
    weights = np.ones(len(log_probs))
    if settings.token_weights == "head_weighted":
        weights[: settings.num_head_tokens] = settings.head_weight
    return float(np.average(log_probs.astype(np.float64), weights=weights))


def step_gain(real: float, counterfactual: Sequence[float]) -> float:
    """Return the log-prob with the step's documents minus its mean over counterfactual ones (eq. 2)."""
    return real - fmean(counterfactual)


def stabilize(gain: float, settings: IGSearchConfig) -> float:
    """Return 0 inside the dead zone, else the gain, scaled if negative, softly clipped to (-eta, eta)."""
    if abs(gain) < settings.dead_zone:
        return 0.0
    scaled = gain if gain > 0 else settings.negative_scale * gain
    return settings.clip * math.tanh(scaled / settings.clip)


def query_bonus(gain: float | None, num_tokens: int, settings: IGSearchConfig) -> float:
    """Return what each token of a query gets on top of the advantage: alpha * gain / |Q| (eq. 4).

    `gain` is stabilized. None where a turn has no gain.
    """
    return 0.0 if gain is None or num_tokens == 0 else settings.gain_weight * gain / num_tokens

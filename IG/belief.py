"""How strongly sampled answers point at the golds, asking the entailment model as little as possible.

Answers that are the same text up to case, spacing and final punctuation are one node, whose samples keep
their weights; the model is never asked whether a text entails itself. When only the hard score is wanted,
semantic classes are grown outwards from the answers that mean a gold, so that classes without one are never
compared among each other; the score is that of the full clustering (a test compares the two).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from IG import semantics
from IG.entailment import EntailmentQueue, Pair
from IG.prompts import entailment_text, normalise_answer
from IG.sampler import SampledAnswer
from IG.semantics import BoolArray, FloatArray, IntArray, ScoreKind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullReading:
    """What the lazy reading leaves out: everything between responses `[response]` and golds `[gold]`."""

    response_entails_gold: FloatArray  # [response, gold]
    gold_entails_response: FloatArray  # [gold, response]
    clusters: IntArray  # [response]
    semantic_entropy: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Belief:
    """What the model believes under one condition."""

    answers: tuple[SampledAnswer, ...]
    weights: FloatArray  # [response], sums to 1
    score: float | None
    """Belief in the golds, in [0, 1]; None when there are no golds."""
    full: FullReading | None


class BeliefReader:
    """Reads beliefs off samples."""

    def __init__(self, queue: EntailmentQueue, *, score: ScoreKind, threshold: float) -> None:
        self._queue = queue
        self._score = score
        self._threshold = threshold

    async def read(
        self, answers: tuple[SampledAnswer, ...], *, question: str, golds: Sequence[str], full: bool
    ) -> Belief:
        """Weigh and score the answers; `full` fills that field too. Raises what the model raises."""
        weights = semantics.sample_weights(np.asarray([answer.mean_log_prob for answer in answers]))
        texts, node_of = _distinct([answer.text for answer in answers])
        judge = _Judge(self._queue, question=question, threshold=self._threshold)
        if full:
            return await self._read_fully(answers, weights, texts, node_of, golds=golds, judge=judge)
        mass = semantics.cluster_probabilities(weights, node_of)  # per distinct text
        if self._score is ScoreKind.hard:
            correct = await judge.nodes_meaning(golds, texts)
            score = float(mass[correct].sum())
        else:
            score = semantics.soft_score(
                mass,
                response_entails_gold=await judge.matrix(texts, golds),
                gold_entails_response=(await judge.matrix(golds, texts)).T,
            )
        return Belief(answers=answers, weights=weights, score=score, full=None)

    async def _read_fully(
        self,
        answers: tuple[SampledAnswer, ...],
        weights: FloatArray,
        texts: Sequence[str],
        node_of: IntArray,
        *,
        golds: Sequence[str],
        judge: _Judge,
    ) -> Belief:
        forward = (await judge.matrix(texts, golds))[node_of]  # [response, gold]
        backward = (await judge.matrix(golds, texts))[:, node_of]  # [gold, response]
        clusters = semantics.connected_components(await judge.equivalences(texts))[node_of]
        score: float | None = None
        if golds and self._score is ScoreKind.hard:
            matches = semantics.equivalent(forward, backward.T, threshold=self._threshold)
            score = semantics.hard_score(weights, clusters=clusters, equivalent_to_gold=matches)
        elif golds:
            score = semantics.soft_score(
                weights, response_entails_gold=forward, gold_entails_response=backward.T
            )
        full = FullReading(
            response_entails_gold=forward,
            gold_entails_response=backward,
            clusters=clusters,
            semantic_entropy=semantics.semantic_entropy(weights, clusters),
        )
        return Belief(answers=answers, weights=weights, score=score, full=full)


class _Judge:
    """Entailment between answers to one question."""

    def __init__(self, queue: EntailmentQueue, *, question: str, threshold: float) -> None:
        self._queue = queue
        self._question = question
        self._threshold = threshold

    async def matrix(self, premises: Sequence[str], hypotheses: Sequence[str]) -> FloatArray:
        """P(premise entails hypothesis): `[premise, hypothesis]`."""
        pairs = [(premise, hypothesis) for premise in premises for hypothesis in hypotheses]
        return (await self._probabilities(pairs)).reshape(len(premises), len(hypotheses))

    async def equivalences(self, texts: Sequence[str]) -> BoolArray:
        """Which texts mean the same: `[text, text]`, upper triangle."""
        rows, columns = np.triu_indices(len(texts), k=1)
        pairs = [(texts[row], texts[column]) for row, column in zip(rows, columns, strict=True)]
        same = np.zeros((len(texts), len(texts)), dtype=np.bool_)
        same[rows, columns] = await self._equivalent(pairs)
        return same

    async def nodes_meaning(self, golds: Sequence[str], texts: Sequence[str]) -> BoolArray:
        """Which texts are in the semantic class of a gold, through however many steps: `[text]`."""
        reached = np.zeros(len(texts), dtype=np.bool_)
        frontier = list(golds)
        while frontier and not reached.all():
            remaining = np.flatnonzero(~reached)
            pairs = [(texts[node], known) for node in remaining for known in frontier]
            linked = (await self._equivalent(pairs)).reshape(len(remaining), len(frontier)).any(axis=1)
            fresh = remaining[linked]
            reached[fresh] = True
            frontier = [texts[node] for node in fresh]
        return reached

    async def _equivalent(self, pairs: Sequence[Pair]) -> BoolArray:
        """Entailment both ways; the way back is asked only where the way there holds."""
        same = (await self._probabilities(pairs)) > self._threshold
        held = np.flatnonzero(same)
        same[held] = (await self._probabilities([pairs[at][::-1] for at in held])) > self._threshold
        return np.asarray(same, dtype=np.bool_)

    async def _probabilities(self, pairs: Sequence[Pair]) -> FloatArray:
        asked: list[Pair | None] = [
            None
            if normalise_answer(premise) == normalise_answer(hypothesis)
            else (entailment_text(self._question, premise), entailment_text(self._question, hypothesis))
            for premise, hypothesis in pairs
        ]
        known = await self._queue.probabilities([pair for pair in asked if pair is not None])
        return np.asarray([1.0 if pair is None else known[pair] for pair in asked], dtype=np.float64)


def _distinct(texts: Sequence[str]) -> tuple[list[str], IntArray]:
    """The first text of every kind, and for each text which kind it is."""
    nodes: dict[str, int] = {}
    first: list[str] = []
    node_of = np.empty(len(texts), dtype=np.int64)
    for position, text in enumerate(texts):
        key = normalise_answer(text)
        if key not in nodes:
            nodes[key] = len(first)
            first.append(text)
        node_of[position] = nodes[key]
    return first, node_of

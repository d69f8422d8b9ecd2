"""Compute the belief in the gold answers from sampled answers, with as few entailment judgements as possible.

Answers with the same text up to case, spacing and final punctuation are one node, and so are gold answers; a
text is never compared with itself. When only the hard score is needed, semantic classes are grown outwards
from the gold answers, so that classes without one are never compared with each other; the score is that of
the full clustering, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from IG import semantics
from IG.prompts import entailment_text
from IG.sampler import SampledAnswer
from IG.semantics import BoolArray, FloatArray, IntArray, ScoreKind
from IG.sharing import SharedJudgements, Source, Work
from serving.answers import same_text_key


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullReading:
    """All relations between responses and golds, which the hard score alone does not need."""

    response_entails_gold: FloatArray  # [response, gold]
    gold_entails_response: FloatArray  # [gold, response]
    clusters: IntArray  # [response]
    semantic_entropy: float
    left_out_entropies: FloatArray
    """The same with each sample left out; empty for a single sample."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Belief:
    """The model's belief under one condition."""

    answers: tuple[SampledAnswer, ...]
    weights: FloatArray  # [response], sums to 1
    score: float | None
    """Belief in the golds, in [0, 1]; None when there are no golds."""
    left_out_scores: FloatArray | None
    """The same with each sample left out; empty for a single sample."""
    source: Source
    full: FullReading | None


class BeliefReader:
    """Computes beliefs from samples."""

    def __init__(self, judgements: SharedJudgements, *, score: ScoreKind, threshold: float) -> None:
        self._judgements = judgements
        self._score = score
        self._threshold = threshold

    async def read(
        self,
        answers: tuple[SampledAnswer, ...],
        *,
        question: str,
        golds: Sequence[str],
        full: bool,
        source: Source,
        work: Work,
    ) -> Belief:
        """Weigh and score the answers; `full` fills that field too. Raises what the judge raises."""
        mean_log_probs = np.asarray([answer.mean_log_prob for answer in answers])
        weights = semantics.sample_weights(mean_log_probs)
        # [1 + left out, response]: one call of a score handles all samples and each left out.
        cases = np.vstack([weights, semantics.leave_one_out_weights(mean_log_probs)])
        # One node per text: it is judged once, however many samples have it; `_of` maps samples to nodes.
        gold_nodes, gold_of = _distinct(golds, question=question)
        nodes, node_of = _distinct([answer.text for answer in answers], question=question, known=gold_nodes)
        judge = _Judge(self._judgements, threshold=self._threshold, work=work)
        reading: FullReading | None = None
        if full:
            # [node, gold] and [gold, node]; indexing by `node_of` and `gold_of` repeats rows per sample.
            forward, backward = await judge.between(nodes, gold_nodes)
            clusters = semantics.connected_components(await judge.same(nodes))[node_of]
            entropies = semantics.semantic_entropy(cases, clusters)
            reading = FullReading(
                response_entails_gold=forward[np.ix_(node_of, gold_of)],
                gold_entails_response=backward[np.ix_(gold_of, node_of)],
                clusters=clusters,
                semantic_entropy=float(entropies[0]),
                left_out_entropies=entropies[1:],
            )
            scores = self._scores_of(cases, reading) if gold_nodes else None
        elif self._score is ScoreKind.hard:
            # Only the classes of the golds count: far fewer pairs than all classes, and the same score.
            correct = await judge.nodes_meaning(gold_nodes, nodes)
            scores = semantics.hard_score(cases, correct=correct[node_of])
        else:
            forward, backward = await judge.between(nodes, gold_nodes)
            scores = _soft_scores(cases, forward[node_of], backward[:, node_of])
        return Belief(
            answers=answers,
            weights=weights,
            score=None if scores is None else float(scores[0]),
            left_out_scores=None if scores is None else scores[1:],
            source=source,
            full=reading,
        )

    def _scores_of(self, cases: FloatArray, reading: FullReading) -> FloatArray:
        forward, backward = reading.response_entails_gold, reading.gold_entails_response
        if self._score is ScoreKind.soft:
            return _soft_scores(cases, forward, backward)
        matches = semantics.equivalent(forward, backward.T, threshold=self._threshold)
        return semantics.hard_score(cases, correct=semantics.correct_responses(reading.clusters, matches))


@dataclass(frozen=True, slots=True)
class _Node:
    """All answers of one text."""

    key: str
    text: str
    """The text that the entailment model reads."""


class _Judge:
    """Entailment between answers to one question."""

    def __init__(self, judgements: SharedJudgements, *, threshold: float, work: Work) -> None:
        self._judgements = judgements
        self._threshold = threshold
        self._work = work

    async def between(self, nodes: Sequence[_Node], golds: Sequence[_Node]) -> tuple[FloatArray, FloatArray]:
        """Return P(node entails gold) `[node, gold]` and P(gold entails node) `[gold, node]`."""
        there = [(node, gold) for node in nodes for gold in golds]
        back = [(gold, node) for gold in golds for node in nodes]
        forward, backward = np.split(await self._probabilities(there + back), [len(there)])
        return forward.reshape(len(nodes), len(golds)), backward.reshape(len(golds), len(nodes))

    async def same(self, nodes: Sequence[_Node]) -> BoolArray:
        """Return which nodes are equivalent: `[node, node]`, upper triangle."""
        rows, columns = np.triu_indices(len(nodes), k=1)
        pairs = [(nodes[row], nodes[column]) for row, column in zip(rows, columns, strict=True)]
        same = np.zeros((len(nodes), len(nodes)), dtype=np.bool_)
        same[rows, columns] = await self._equivalent(pairs)
        return same

    async def nodes_meaning(self, golds: Sequence[_Node], nodes: Sequence[_Node]) -> BoolArray:
        """Return which nodes are in the semantic class of a gold, in any number of steps: `[node]`."""
        reached = np.zeros(len(nodes), dtype=np.bool_)
        frontier = list(golds)
        compared = {gold.key for gold in golds}
        while frontier and not reached.all():
            remaining = np.flatnonzero(~reached)
            pairs = [(nodes[at], known) for at in remaining for known in frontier]
            linked = (await self._equivalent(pairs)).reshape(len(remaining), len(frontier)).any(axis=1)
            linked_nodes = remaining[linked]
            reached[linked_nodes] = True
            # A gold that is also an answer was compared with all nodes already.
            frontier = [nodes[at] for at in linked_nodes if nodes[at].key not in compared]
        return reached

    async def _equivalent(self, pairs: Sequence[tuple[_Node, _Node]]) -> BoolArray:
        """Return entailment in both directions; the second is judged only where the first holds.

        The first direction depends on the texts alone, so that other conditions find it judged already.
        """
        pairs = [(one, other) if one.text < other.text else (other, one) for one, other in pairs]
        same = (await self._probabilities(pairs)) > self._threshold
        held = np.flatnonzero(same)
        same[held] = (await self._probabilities([pairs[at][::-1] for at in held])) > self._threshold
        return np.asarray(same, dtype=np.bool_)

    async def _probabilities(self, pairs: Sequence[tuple[_Node, _Node]]) -> FloatArray:
        asked = [None if one.key == other.key else (one.text, other.text) for one, other in pairs]
        unequal = [pair for pair in asked if pair is not None]
        self._work.pairs_equal += len(asked) - len(unequal)
        known = await self._judgements.of(unequal, self._work) if unequal else {}
        return np.asarray([1.0 if pair is None else known[pair] for pair in asked], dtype=np.float64)


def _soft_scores(cases: FloatArray, forward: FloatArray, backward: FloatArray) -> FloatArray:
    return semantics.soft_score(cases, response_entails_gold=forward, gold_entails_response=backward.T)


def _distinct(
    texts: Sequence[str], *, question: str, known: Sequence[_Node] = ()
) -> tuple[list[_Node], IntArray]:
    """Return the distinct nodes in order of first appearance, and the node of each text.

    The model reads the plainest spelling of a node, so that nothing depends on the order of the samples. A
    node in `known` is reused, so that an answer that is a gold relates to others as the gold does.
    """
    plainest: dict[str, str] = {}
    keys = [same_text_key(text) for text in texts]
    for key, text in zip(keys, texts, strict=True):
        plainest[key] = min(plainest.get(key, text), text, key=lambda spelling: (len(spelling), spelling))
    number = {key: at for at, key in enumerate(plainest)}
    as_before = {node.key: node for node in known}
    nodes = [
        as_before.get(key) or _Node(key, entailment_text(question, text)) for key, text in plainest.items()
    ]
    return nodes, np.asarray([number[key] for key in keys], dtype=np.int64)

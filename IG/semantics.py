"""What sampled answers say about what the model believes: weights, semantic classes, scores, entropy, gains.

Pure functions over NumPy arrays; no model and no I/O. Axes, always in this order and by these names:

    response   the R answers sampled under one condition (with the context, or without it)
    gold       the A accepted answers of the question

Scores take weights `[..., response]` and give `[...]`, so that one call reads all the weights that leaving
one sample out makes (`leave_one_out_weights`).

Entailment matrices are always `[response, gold]`: entry `[r, g]` of `response_entails_gold` is the
probability that response r entails gold g, and of `gold_entails_response` that gold g entails response r.
"""

from __future__ import annotations

import math
from enum import StrEnum

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

LOG_RATIO_LIMIT = 3.0
_ROUNDING = 1e-12
"""Scores that differ by less are the same, summed differently."""


class ScoreKind(StrEnum):
    """How the belief in the right answer is read off the samples."""

    hard = "hard"
    soft = "soft"


class GainKind(StrEnum):
    """How two conditions are compared."""

    difference = "difference"
    log_ratio = "log_ratio"
    entropy = "entropy"


def sample_weights(mean_log_probs: FloatArray) -> FloatArray:
    """Softmax of the mean token log-probs over the samples of one condition: `[response]`, sums to 1."""
    if mean_log_probs.size == 0 or not np.isfinite(mean_log_probs).all():
        raise ValueError(f"mean log-probs must be finite and at least one, got {mean_log_probs.tolist()}")
    shifted = np.exp(mean_log_probs - mean_log_probs.max())
    return np.asarray(shifted / shifted.sum(), dtype=np.float64)


def leave_one_out_weights(mean_log_probs: FloatArray) -> FloatArray:
    """Weights of the others when one sample had not been drawn: `[left out, response]`, R x R.

    The one left out has weight 0. No row where there is no other sample.
    """
    size = mean_log_probs.size
    if size < 2:
        return np.empty((0, size), dtype=np.float64)
    others = np.where(np.eye(size, dtype=np.bool_), -np.inf, mean_log_probs)
    shifted = np.exp(others - others.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float64)


def soft_score(
    weights: FloatArray, *, response_entails_gold: FloatArray, gold_entails_response: FloatArray
) -> FloatArray:
    """Expected entailment with the best gold: max over golds of sum_r p_r * max over directions."""
    _require_shape(weights, response_entails_gold, gold_entails_response)
    either_direction = np.maximum(response_entails_gold, gold_entails_response)
    # Summed in the order of the weights' own sum, so that certainty is exactly 1.
    expected = (weights[..., None, :] * np.ascontiguousarray(either_direction.T)).sum(axis=-1)  # [..., gold]
    return np.asarray(expected.max(axis=-1) / weights.sum(axis=-1), dtype=np.float64)


def equivalent(forward: FloatArray, backward: FloatArray, *, threshold: float) -> BoolArray:
    """Entailment in both directions, strictly above the threshold, element by element."""
    return np.asarray((forward > threshold) & (backward > threshold), dtype=np.bool_)


def connected_components(adjacent: BoolArray) -> IntArray:
    """Component id of every node of an undirected graph `[node, node]`, numbered by first member.

    Equivalence by a model is not transitive; the semantic classes are its transitive closure.
    """
    num_nodes = adjacent.shape[0]
    linked = adjacent | adjacent.T
    components = np.full(num_nodes, -1, dtype=np.int64)
    num_components = 0
    for start in range(num_nodes):
        if components[start] >= 0:
            continue
        frontier = [start]
        components[start] = num_components
        while frontier:
            node = frontier.pop()
            fresh = np.flatnonzero(linked[node] & (components < 0))
            components[fresh] = num_components
            frontier.extend(fresh.tolist())
        num_components += 1
    return components


def cluster_probabilities(weights: FloatArray, clusters: IntArray) -> FloatArray:
    """Probability mass of every cluster: `[..., cluster]`, sums to 1."""
    member = clusters[:, None] == np.arange(int(clusters.max()) + 1)  # [response, cluster]
    masses = (weights[..., :, None] * member).sum(axis=-2)
    return np.asarray(masses / masses.sum(axis=-1, keepdims=True), dtype=np.float64)


def correct_responses(clusters: IntArray, equivalent_to_gold: BoolArray) -> BoolArray:
    """A cluster is correct if any member is equivalent to any gold (`[response, gold]`): `[response]`."""
    correct = np.zeros(int(clusters.max()) + 1, dtype=np.bool_)
    correct[clusters[equivalent_to_gold.any(axis=1)]] = True
    return np.asarray(correct[clusters], dtype=np.bool_)


def hard_score(weights: FloatArray, *, correct: BoolArray) -> FloatArray:
    """Probability mass of the responses `[response]` in correct clusters; exactly 1 when all are."""
    mass = (weights * correct).sum(axis=-1)
    return np.asarray(mass / weights.sum(axis=-1), dtype=np.float64)


def semantic_entropy(weights: FloatArray, clusters: IntArray) -> FloatArray:
    """Entropy in nats over the semantic classes."""
    probabilities = cluster_probabilities(weights, clusters)
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return np.asarray(-(probabilities * logs).sum(axis=-1) + 0.0, dtype=np.float64)  # no -0.0


def log_score(score: FloatArray, *, floor: float) -> FloatArray:
    """Log of a score that is floored: R samples cannot tell 0 from rare."""
    return np.asarray(np.log(np.maximum(score, floor)), dtype=np.float64)


def gain(kind: GainKind, with_context: float, no_context: float) -> float:
    """Compare the statistics of two conditions.

    `difference` of scores, in [-1, 1]; `log_ratio` of log-scores, clipped to +-LOG_RATIO_LIMIT; `entropy` is
    the drop of the semantic entropy and needs no gold answer.
    """
    if kind is GainKind.entropy:
        return no_context - with_context
    if kind is GainKind.log_ratio:
        return float(np.clip(with_context - no_context, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return with_context - no_context


def gain_limit(kind: GainKind, *, num_samples: int) -> float:
    """Largest absolute value of a gain from so many samples per condition."""
    if kind is GainKind.entropy:
        return math.log(max(num_samples, 2))
    return LOG_RATIO_LIMIT if kind is GainKind.log_ratio else 1.0


def jackknife_error(left_out: FloatArray) -> float | None:
    """Standard error of a statistic from its values with each sample left out: `[left out]`.

    sqrt((R-1)/R * sum_i (s_i - mean)^2), where s_i reads the other samples with their weights renormalised
    and entailment and semantic classes as they were. 0 means that all samples agree, not that the score is
    exact; None where a single sample says nothing about its error.
    """
    if left_out.size < 2:
        return None
    if np.ptp(left_out) <= _ROUNDING:
        return 0.0
    share = (left_out.size - 1) / left_out.size
    return float(np.sqrt(share * np.square(left_out - left_out.mean()).sum()))


def gain_error(with_context: float | None, no_context: float | None) -> float | None:
    """Standard error of a gain between conditions that were sampled independently."""
    if with_context is None or no_context is None:
        return None
    return float(np.hypot(with_context, no_context))


def _require_shape(weights: FloatArray, *matrices: FloatArray) -> None:
    num_responses = weights.shape[-1]
    for matrix in matrices:
        if matrix.ndim != 2 or matrix.shape[0] != num_responses or matrix.shape[1] == 0:
            raise ValueError(
                f"entailment must be [response, gold] = [{num_responses}, at least 1], got {matrix.shape}"
            )

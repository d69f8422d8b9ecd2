"""Compute weights, semantic classes, scores, entropies and gains from sampled answers.

Pure functions over NumPy arrays; no model and no I/O. Axes, always in this order and by these names:

    response   the R answers sampled under one condition (with the context, or without it)
    gold       the A accepted answers of the question

Scores take weights `[..., response]` and return `[...]`, so that one call handles all leave-one-out weights.

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
"""Scores that differ by less are equal up to rounding."""


class ScoreKind(StrEnum):
    """How the belief in the right answer is computed from the samples."""

    hard = "hard"
    soft = "soft"


class GainKind(StrEnum):
    """How two conditions are compared."""

    difference = "difference"
    log_ratio = "log_ratio"
    entropy = "entropy"


def sample_weights(mean_log_probs: FloatArray) -> FloatArray:
    """Return the softmax of mean token log-probs `[response]` over the samples of one condition."""
    if mean_log_probs.size == 0 or not np.isfinite(mean_log_probs).all():
        raise ValueError(f"mean log-probs must be finite and at least one, got {mean_log_probs.tolist()}")
    shifted = np.exp(mean_log_probs - mean_log_probs.max())
    return np.asarray(shifted / shifted.sum(), dtype=np.float64)


def leave_one_out_weights(mean_log_probs: FloatArray) -> FloatArray:
    """Return the weights with each sample left out: `[left out, response]`, R x R; its own weight is 0.

    Empty for a single sample.
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
    """Return the expected entailment: max over golds of sum_r p_r * max over directions."""
    _require_shape(weights, response_entails_gold, gold_entails_response)
    either_direction = np.maximum(response_entails_gold, gold_entails_response)
    # Summed in the same order as the weights, so that certainty is exactly 1.
    expected = (weights[..., None, :] * np.ascontiguousarray(either_direction.T)).sum(axis=-1)  # [..., gold]
    return np.asarray(expected.max(axis=-1) / weights.sum(axis=-1), dtype=np.float64)


def equivalent(forward: FloatArray, backward: FloatArray, *, threshold: float) -> BoolArray:
    """Return where entailment holds in both directions, strictly above the threshold."""
    return np.asarray((forward > threshold) & (backward > threshold), dtype=np.bool_)


def connected_components(adjacent: BoolArray) -> IntArray:
    """Return the component id of every node of an undirected graph `[node, node]`, numbered by first member.

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
            reached = np.flatnonzero(linked[node] & (components < 0))
            components[reached] = num_components
            frontier.extend(reached.tolist())
        num_components += 1
    return components


def cluster_probabilities(weights: FloatArray, clusters: IntArray) -> FloatArray:
    """Return the probability mass of every cluster: `[..., cluster]`, sums to 1."""
    member = clusters[:, None] == np.arange(int(clusters.max()) + 1)  # [response, cluster]
    masses = (weights[..., :, None] * member).sum(axis=-2)
    return np.asarray(masses / masses.sum(axis=-1, keepdims=True), dtype=np.float64)


def correct_responses(clusters: IntArray, equivalent_to_gold: BoolArray) -> BoolArray:
    """Return `[response]` in correct clusters: any member is equivalent to any gold `[response, gold]`."""
    correct = np.zeros(int(clusters.max()) + 1, dtype=np.bool_)
    correct[clusters[equivalent_to_gold.any(axis=1)]] = True
    return np.asarray(correct[clusters], dtype=np.bool_)


def hard_score(weights: FloatArray, *, correct: BoolArray) -> FloatArray:
    """Return the probability mass of the correct responses `[response]`; exactly 1 when all are."""
    mass = (weights * correct).sum(axis=-1)
    return np.asarray(mass / weights.sum(axis=-1), dtype=np.float64)


def semantic_entropy(weights: FloatArray, clusters: IntArray) -> FloatArray:
    """Return the entropy in nats over the semantic classes."""
    probabilities = cluster_probabilities(weights, clusters)
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return np.asarray(-(probabilities * logs).sum(axis=-1) + 0.0, dtype=np.float64)  # no -0.0


def log_score(score: FloatArray, *, floor: float) -> FloatArray:
    """Return the log of a score, floored: R samples cannot tell 0 from rare."""
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
    """Return the largest absolute value of a gain from `num_samples` samples per condition."""
    if kind is GainKind.entropy:
        return math.log(max(num_samples, 2))
    return LOG_RATIO_LIMIT if kind is GainKind.log_ratio else 1.0


def jackknife_error(left_out: FloatArray) -> float | None:
    """Return the jackknife standard error of a statistic from its leave-one-out values `[left out]`.

    sqrt((R-1)/R * sum_i (s_i - mean)^2), where s_i uses the other samples with renormalized weights and
    unchanged entailment and semantic classes. 0 means that all samples agree, not that the score is exact;
    None for a single sample.
    """
    if left_out.size < 2:
        return None
    if np.ptp(left_out) <= _ROUNDING:
        return 0.0
    share = (left_out.size - 1) / left_out.size
    return float(np.sqrt(share * np.square(left_out - left_out.mean()).sum()))


def gain_error(with_context: float | None, no_context: float | None) -> float | None:
    """Return the standard error of a gain between independently sampled conditions."""
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

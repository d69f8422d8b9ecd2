"""What sampled answers say about what the model believes: weights, semantic classes, scores, entropy, gains.

Pure functions over NumPy arrays; no model and no I/O. Axes, always in this order and by these names:

    response   the R answers sampled under one condition (with the context, or without it)
    gold       the A accepted answers of the question

Entailment matrices are always `[response, gold]`: entry `[r, g]` of `response_entails_gold` is the
probability that response r entails gold g, and of `gold_entails_response` that gold g entails response r.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


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


def soft_score(
    weights: FloatArray, *, response_entails_gold: FloatArray, gold_entails_response: FloatArray
) -> float:
    """Expected entailment with the best gold: max over golds of sum_r p_r * max over directions."""
    _require_shape(weights, response_entails_gold, gold_entails_response)
    either_direction = np.maximum(response_entails_gold, gold_entails_response)
    return float((weights @ either_direction).max())


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
    """Probability mass of every cluster: `[cluster]`."""
    return np.asarray(np.bincount(clusters, weights=weights), dtype=np.float64)


def correct_clusters(clusters: IntArray, equivalent_to_gold: BoolArray) -> BoolArray:
    """A cluster is correct if any member is equivalent to any gold (`[response, gold]`): `[cluster]`."""
    correct = np.zeros(int(clusters.max()) + 1, dtype=np.bool_)
    correct[clusters[equivalent_to_gold.any(axis=1)]] = True
    return correct


def hard_score(weights: FloatArray, *, clusters: IntArray, equivalent_to_gold: BoolArray) -> float:
    """Probability mass of the correct clusters."""
    probabilities = cluster_probabilities(weights, clusters)
    return float(probabilities[correct_clusters(clusters, equivalent_to_gold)].sum())


def semantic_entropy(weights: FloatArray, clusters: IntArray) -> float:
    """Entropy in nats over the semantic classes."""
    probabilities = cluster_probabilities(weights, clusters)
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def difference_gain(with_context: float, no_context: float) -> float:
    """Growth of the score, in [-1, 1]."""
    return with_context - no_context


def log_ratio_gain(with_context: float, no_context: float, *, floor: float, limit: float = 3.0) -> float:
    """Growth of the log-score, both scores floored (R samples cannot tell 0 from rare), within +-limit."""
    ratio = float(np.log(max(with_context, floor)) - np.log(max(no_context, floor)))
    return float(np.clip(ratio, -limit, limit))


def entropy_gain(with_context: float, no_context: float) -> float:
    """Drop of the semantic entropy; needs no gold answer."""
    return no_context - with_context


def _require_shape(weights: FloatArray, *matrices: FloatArray) -> None:
    for matrix in matrices:
        if matrix.ndim != 2 or matrix.shape[0] != weights.shape[0] or matrix.shape[1] == 0:
            raise ValueError(
                f"entailment must be [response, gold] = [{weights.shape[0]}, at least 1], got {matrix.shape}"
            )

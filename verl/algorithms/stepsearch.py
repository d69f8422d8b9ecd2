"""StepSearch: reward a search for supporting passages that earlier ones had not found (arXiv 2505.15107).

With c_k(d) the largest similarity (TF-IDF cosine) of supporting passage d to the results of search k and
M_k(d) its maximum over searches 1 to k, the gain of search k is the mean over d of
max(c_k(d) - M_{k-1}(d), 0); its redundancy is the share of its passages that an earlier search had returned.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verl.algorithms.base import Algorithm, Measurement, Need, Prefetch
from verl.algorithms.statistics import UNSCALED, credit_returns
from verl.trainer.config.fields import not_negative, share
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import Credit, Gain, Group, Passage, Question, Score, Stop, Trajectory, Turn


@dataclass
class StepSearchConfig(AlgorithmConfig):
    """Settings of `algorithm=stepsearch`."""

    name: str = "stepsearch"
    gamma: float = share(1.0)
    gain_weight: float = not_negative(1.0)
    """Weight of gain minus redundancy against the outcome."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_ignored("norm_adv_by_std_in_grpo", because=f"algorithm=stepsearch: {UNSCALED}")


class StepSearch(Algorithm):
    """Reward every search by the supporting passages that it adds, and the last turn by the outcome."""

    settings: StepSearchConfig
    settings_class = StepSearchConfig
    needs = frozenset({Need.SUPPORTING_IDS})
    outcome = "f1"

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Return gain minus redundancy of every turn that searched."""
        return Measurement(gains=[[measure_searches(t) for t in group.trajectories] for group in groups])

    def credit(
        self,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Score]],
        *,
        progress: float = 0.0,
    ) -> list[list[Credit]]:
        """Credit weighted gains and the outcome, each turn with all that came from it on."""
        return credit_returns(
            groups, scores, gain_weight=self.settings.gain_weight, discount=self.settings.gamma
        )


def measure_searches(trajectory: Trajectory) -> Gain:
    """Return gain minus redundancy of every turn that searched.

    A question whose supporting passages are unknown has nothing to measure: all its attempts are compared by
    their outcomes alone.
    """
    question = trajectory.question
    if trajectory.stop is Stop.FAILED or not question.supporting_ids:
        return Gain()
    searches = [t for t, turn in enumerate(trajectory.turns) if _has_searched(turn)]
    values: list[float | None] = [None] * len(trajectory.turns)
    if searches:
        results = [trajectory.turns[t].passages for t in searches]
        ids = [[passage.id for passage in of_one] for of_one in results]
        for t, gain in zip(searches, net_gains(similarities(question, results), ids), strict=True):
            values[t] = gain
    return Gain(turns=tuple(values))


def _has_searched(turn: Turn) -> bool:
    """Return whether a turn searched: it read passages, or called `search`, which may find none."""
    return bool(turn.passages) or any(c.tool == "search" for c in turn.action.calls if turn.observations)


def net_gains(similarities: Sequence[Sequence[float]], results: Sequence[Sequence[str]]) -> list[float]:
    """Return gain minus redundancy of each search; see `coverage_gains` and `redundancies`."""
    pairs = zip(coverage_gains(similarities), redundancies(results), strict=True)
    return [gain - share_seen for gain, share_seen in pairs]


def similarities(question: Question, results: Sequence[Sequence[Passage]]) -> list[list[float]]:
    """Return per search and supporting passage the largest similarity of a result to it [K, D].

    A passage is 1 to itself. To another one it is the cosine of their TF-IDF vectors over all these
    passages. Without texts in the data it is 1 where the id is the passage's title, else 0.
    """
    passages = [passage for of_one in results for passage in of_one]
    cosines = np.zeros((len(passages), len(question.supporting_ids)))
    if question.supporting_texts and passages:
        vectors = tf_idf([*question.supporting_texts, *(f"{p.title} {p.text}" for p in passages)])
        count = len(question.supporting_texts)
        cosines = vectors[count:] @ vectors[:count].T
    for i, passage in enumerate(passages):
        for d, supporting_id in enumerate(question.supporting_ids):
            # A title names a whole article, so a text says better which passages of it are meant.
            is_title = not question.supporting_texts and passage.title.strip(' "') == supporting_id
            if passage.id == supporting_id or is_title:
                cosines[i, d] = 1.0
    borders = np.cumsum([0, *(len(of_one) for of_one in results)])
    return [cosines[a:b].max(axis=0, initial=0.0).tolist() for a, b in itertools.pairwise(borders)]


def tf_idf(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return unit vectors of word counts times `ln((1 + n) / (1 + df)) + 1` [texts, words]."""
    words = [Counter(re.findall(r"\w\w+", text.lower())) for text in texts]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(w for of_one in words for w in of_one))}
    counts = np.zeros((len(texts), len(vocabulary)))
    for row, of_one in zip(counts, words, strict=True):
        for word, count in of_one.items():
            row[vocabulary[word]] = count
    weighted = counts * (np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))) + 1.0)
    norms = np.linalg.norm(weighted, axis=1, keepdims=True)
    unit: npt.NDArray[np.float64] = weighted / np.where(norms > 0, norms, 1.0)
    return unit


def coverage_gains(similarities: Sequence[Sequence[float]]) -> list[float]:
    """Return the gain of each search from its similarities c_k to the supporting passages [K, D]."""
    matrix = np.asarray(similarities, dtype=np.float64)
    best = np.maximum.accumulate(np.vstack([np.zeros((1, matrix.shape[1])), matrix]))[:-1]  # M_{k-1}
    gains: list[float] = np.maximum(matrix - best, 0.0).mean(axis=1).tolist()
    return gains


def redundancies(results: Sequence[Sequence[str]]) -> list[float]:
    """Return per search the share of its passage ids that an earlier search returned; 0 without results."""
    seen: set[str] = set()
    shares = []
    for ids in results:
        shares.append(sum(one in seen for one in ids) / len(ids) if ids else 0.0)
        seen.update(ids)
    return shares

"""SIOP: reward turns for raising the log-prob of the group's consensus, without gold answers (2605.04984).

Answers of a group are clustered by bidirectional entailment. Cluster c has mass m_c, its share of the valid
answers, and support r_c, the mean probability that a member's own search results entail it:
q_c = m_c exp(eta r_c) / Z. A turn of a trajectory with an answer in c gets q_c times the rise of
log p_t, where p_t is the mean over members of exp(mean log-prob per token) after the turn; the last turn also
gets (1 - lambda) q_c. The rewards of the group are pooled, standardized and summed over later turns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from verl.algorithms.base import Algorithm, Measurement, Need, Prefetch, Services
from verl.algorithms.scoring.log_prob import (
    AnswerProbes,
    Probe,
    has_changed,
    measure_states,
)
from verl.algorithms.statistics import group_advantages, returns_to_go, spread_turns
from verl.trainer.config.fields import not_negative, positive, share
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import Credit, Gain, Group, Score, Stop, Trajectory

ENTAILED = 0.5
"""Two answers mean the same when each entails the other with more than this probability."""
FLOOR = 1e-8
"""Added to a probability before its logarithm, as in the authors' code."""


@dataclass
class SIOPConfig(AlgorithmConfig):
    """Settings of `algorithm=siop`."""

    name: str = "siop"
    gamma: float = share(1.0)
    eta: float = not_negative(1.0)
    gain_share: float = share(0.5)
    """lambda."""
    max_members: int = positive(3)
    """Most distinct answers of a cluster that are scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Trajectories of a group whose answers mean the same."""

    members: tuple[int, ...]
    answers: tuple[str, ...]
    """Distinct answers of the members, as many as are scored."""
    weight: float
    """q_c."""
    support: float
    """r_c."""


class SIOP(Algorithm):
    """Reward every turn by the rise of the log-prob of the group's own answers of the same meaning."""

    settings: SIOPConfig
    settings_class = SIOPConfig
    needs = frozenset({Need.POLICY_LOG_PROBS, Need.ENTAILMENT})
    answer_wrapper = "<answer>{answer}</answer>"

    def __init__(self, settings: SIOPConfig, services: Services) -> None:
        super().__init__(settings, services)
        self._probes = AnswerProbes(services.codec, services.answer_wrapper)

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Measure the reward of every turn of every trajectory that answered."""
        assert self.services.policy is not None
        clusters: dict[int, Cluster] = {}
        unjudged: set[int] = set()
        for group, found in zip(groups, await self._cluster(groups), strict=True):
            if found is None:
                unjudged.update(id(t) for t in group.trajectories if _has_answer(t))
                continue
            clusters.update((id(group.trajectories[i]), c) for c in found for i in c.members)

        def probes(trajectory: Trajectory) -> list[Probe] | None:
            cluster = clusters.get(id(trajectory))
            if cluster is None or not has_changed(trajectory):
                return None
            return self._probes.encode_all(cluster.answers, trajectory=trajectory)

        def turns(trajectory: Trajectory, states: list[list[float]]) -> list[float]:
            beliefs = [cluster_belief(of_state) for of_state in states]
            return turn_rewards(beliefs, clusters[id(trajectory)].weight, self.settings)

        measurement = await measure_states(
            groups, probes, scorer=self.services.policy, reduce=np.mean, turns=turns
        )

        def complete(trajectory: Trajectory, gain: Gain) -> Gain:
            if id(trajectory) in unjudged:
                return Gain(failure="gain_failed: the entailment of the answers could not be judged")
            if id(trajectory) in clusters and not has_changed(trajectory):
                weight = clusters[id(trajectory)].weight
                return Gain(turns=tuple(turn_rewards([], weight, self.settings)))
            return gain

        gains = [
            [complete(*pair) for pair in zip(group.trajectories, of_group, strict=True)]
            for group, of_group in zip(groups, measurement.gains, strict=True)
        ]
        supports = [cluster.support for cluster in clusters.values()]
        support = {"ig/support_mean": fmean(supports)} if supports else {}
        return replace(measurement, gains=gains, stats=measurement.stats | support)

    def credit(
        self,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Score]],
        *,
        progress: float = 0.0,
    ) -> list[list[Credit]]:
        """Credit turn rewards, pooled within the group; the outcome is for logs only."""
        return [
            [
                _credit(*parts)
                for parts in zip(
                    group.trajectories,
                    turn_returns([_rewards(score) for score in of_group], self.settings),
                    of_group,
                    strict=True,
                )
            ]
            for group, of_group in zip(groups, scores, strict=True)
        ]

    async def _cluster(self, groups: Sequence[Group]) -> list[list[Cluster] | None]:
        """Return the clusters of each group's answers; None where a pair could not be judged."""
        assert self.services.entailment is not None
        contexts = [self._contexts(group) for group in groups]
        asked = [_pairs(of_group) for of_group in contexts]
        answers = iter(await self.services.entailment.judge([pair for pairs in asked for pair in pairs]))
        judged = [{pair: next(answers) for pair in pairs} for pairs in asked]
        return [
            None if None in of_group.values() else self._clusters(group, read, of_group)  # type: ignore[arg-type]
            for group, read, of_group in zip(groups, contexts, judged, strict=True)
        ]

    def _contexts(self, group: Group) -> list[tuple[Trajectory, str]]:
        """Return what each trajectory with an answer had read."""
        return [
            (t, self.services.render_context(t) if t.passages else "")
            for t in group.trajectories
            if _has_answer(t)
        ]

    def _clusters(
        self,
        group: Group,
        contexts: Sequence[tuple[Trajectory, str]],
        judged: Mapping[tuple[str, str], float],
    ) -> list[Cluster]:
        answered = [i for i, t in enumerate(group.trajectories) if _has_answer(t)]
        texts = list(dict.fromkeys(_statement(group.trajectories[i]) for i in answered))
        numbers = connect(texts, lambda a, b: min(judged[a, b], judged[b, a]) > ENTAILED)
        # A trajectory that read nothing has no support for its answer.
        support = [judged[context, _statement(t)] if context else 0.0 for t, context in contexts]
        of_cluster = [
            [k for k, i in enumerate(answered) if numbers[_statement(group.trajectories[i])] == number]
            for number in range(len(set(numbers.values())))
        ]
        supports = [fmean(support[k] for k in members) for members in of_cluster]
        masses = [len(members) / len(answered) for members in of_cluster]
        weights = cluster_weights(masses, supports, eta=self.settings.eta)
        return [
            Cluster(
                members=tuple(answered[k] for k in members),
                answers=tuple(dict.fromkeys(str(group.trajectories[answered[k]].answer) for k in members))[
                    : self.settings.max_members
                ],
                weight=weight,
                support=of_one,
            )
            for members, weight, of_one in zip(of_cluster, weights, supports, strict=True)
        ]


def _pairs(contexts: Sequence[tuple[Trajectory, str]]) -> list[tuple[str, str]]:
    """Return the pairs to judge in a group: distinct answers both ways, and passages with their answer."""
    texts = list(dict.fromkeys(_statement(t) for t, _ in contexts))
    read = ((context, _statement(t)) for t, context in contexts if context)
    return list(dict.fromkeys([*itertools.permutations(texts, 2), *read]))


def _has_answer(trajectory: Trajectory) -> bool:
    return trajectory.stop is not Stop.FAILED and bool(trajectory.answer)


def _statement(trajectory: Trajectory) -> str:
    """Return the answer after its question, as texts are judged."""
    return f"{trajectory.question.text} {trajectory.answer}"


def _rewards(score: Score) -> list[float] | None:
    if score.failure is not None or not score.gain.turns:
        return None
    return [gain or 0.0 for gain in score.gain.turns]


def _credit(trajectory: Trajectory, returns: Sequence[float], score: Score) -> Credit:
    rewards = _rewards(score)
    return Credit(
        advantages=spread_turns(trajectory, returns or [0.0] * len(trajectory.turns)),
        components={
            "reward": None if score.failure is not None else math.fsum(rewards or ()),
            "outcome": score.outcome,
            "gain": score.gain.turns or None,
            "turn_advantage": tuple(returns) if returns else None,
        },
    )


def connect(texts: Sequence[str], is_same: Callable[[str, str], bool]) -> dict[str, int]:
    """Return the number of each text's cluster, the connected components of `is_same`, from 0 in order."""
    numbers = {text: i for i, text in enumerate(texts)}
    for one, other in itertools.combinations(texts, 2):
        if numbers[one] != numbers[other] and is_same(one, other):
            old, new = sorted((numbers[one], numbers[other]))[::-1]
            numbers = {text: new if number == old else number for text, number in numbers.items()}
    order = {number: i for i, number in enumerate(dict.fromkeys(numbers.values()))}
    return {text: order[number] for text, number in numbers.items()}


def cluster_weights(masses: Sequence[float], supports: Sequence[float], *, eta: float) -> list[float]:
    """Return q_c of each cluster; they sum to 1."""
    raw = [m * math.exp(eta * r) for m, r in zip(masses, supports, strict=True)]
    total = math.fsum(raw)
    return [value / total for value in raw]


def cluster_belief(mean_log_probs: Sequence[float]) -> float:
    """Return p_t, the mean over member answers of exp(mean log-prob per token) in one state."""
    return fmean(math.exp(value) for value in mean_log_probs)


def turn_rewards(beliefs: Sequence[float], weight: float, settings: SIOPConfig) -> list[float]:
    """Return the reward of every turn from p before the first turn and after each but the last one.

    `weight` is q of the trajectory's own cluster. The last turn, which answers, gets the bonus alone; a
    trajectory of one turn needs no p.
    """
    logs = [math.log(belief + FLOOR) for belief in beliefs]
    bonus = (1.0 - settings.gain_share) * weight
    return [*(weight * (after - before) for before, after in itertools.pairwise(logs)), bonus]


def turn_returns(rewards: Sequence[Sequence[float] | None], settings: SIOPConfig) -> list[list[float]]:
    """Return advantages per turn of one group: pooled over all turns, standardized, summed over later turns.

    None for a trajectory that failed or gave no answer: it enters no statistic and gets no turns.
    """
    by_std = settings.norm_adv_by_std_in_grpo
    pooled = iter(group_advantages([r for of_one in rewards for r in of_one or ()], by_std=by_std))
    return [
        returns_to_go([next(pooled) for _ in of_one or ()], discount=settings.gamma) for of_one in rewards
    ]

"""GiGPO: group-in-group advantages, of episodes and of steps taken in the same state (arXiv 2505.10978).

A(i, t) = A_E(i) + w * A_S(i, t). A_E is the advantage of the outcome within the group. A_S compares the
discounted outcome, `discount^(T-1-t) * R`, between turns of the group that were sampled after the same
observation; a turn that shares its state with no other gets 0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from verl.algorithms.base import Algorithm
from verl.algorithms.statistics import group_advantages, spread_turns
from verl.trainer.config.fields import not_negative, one_of, share
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import Credit, Group, Score, Trajectory


@dataclass
class GiGPOConfig(AlgorithmConfig):
    """Settings of `algorithm=gigpo`; the defaults are those of the paper's search experiments."""

    name: str = "gigpo"
    gamma: float = share(0.95)
    step_advantage_w: float = not_negative(1.0)
    mode: str = one_of("mean_std_norm", "mean_norm")
    """`mean_norm`: without division by the spread."""
    similarity_thresh: float = share(0.9)
    """Observations of at least this SequenceMatcher ratio are one state; 1: only equal tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_ignored("norm_adv_by_std_in_grpo", because="algorithm=gigpo, whose key is algorithm.mode")


class GiGPO(Algorithm):
    """Reward a trajectory by its outcome, and each turn by the outcomes that followed from the same state."""

    settings: GiGPOConfig
    settings_class = GiGPOConfig

    def credit(
        self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
    ) -> list[list[Credit]]:
        """Credit episode plus weighted step advantages on the tokens of each turn."""
        return [
            self._credit_group(group.trajectories, of_group)
            for group, of_group in zip(groups, scores, strict=True)
        ]

    def _credit_group(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Credit]:
        settings = self.settings
        by_std = settings.mode == "mean_std_norm"
        outcomes = [score.valid_outcome for score in scores]
        episode = group_advantages(outcomes, by_std=by_std)
        step = step_advantages(
            [states_before(trajectory) for trajectory in trajectories],
            outcomes,
            discount=settings.gamma,
            similarity=settings.similarity_thresh,
            by_std=by_std,
        )
        return [
            Credit(
                advantages=spread_turns(
                    trajectory, [whole + settings.step_advantage_w * part for part in parts]
                ),
                components={
                    "reward": outcome,
                    "outcome": outcome,
                    "step_advantage": tuple(parts) if outcome is not None else None,
                },
            )
            for trajectory, outcome, whole, parts in zip(trajectories, outcomes, episode, step, strict=True)
        ]


@dataclass(frozen=True, slots=True, order=True)
class State:
    """What the policy read last before it sampled a turn. Empty: the question."""

    text: str = ""
    """What tools returned; empty where they returned nothing, and after an invalid action."""
    ids: tuple[int, ...] = ()
    """All that was appended, also for an empty result or an invalid action."""

    def is_like(self, other: State, similarity: float) -> bool:
        """Return whether the two were read as the same tokens or have similar texts."""
        if self.ids == other.ids:
            return True
        if similarity >= 1.0 or not (self.text and other.text):
            return False
        matcher = SequenceMatcher(None, self.text, other.text)
        return matcher.quick_ratio() >= similarity and matcher.ratio() >= similarity


def states_before(trajectory: Trajectory) -> list[State]:
    """Return the state before each turn."""
    read = [
        State("\n".join(each.text for each in turn.observations), tuple(turn.observation_ids.tolist()))
        for turn in trajectory.turns
    ]
    return [State(), *read[:-1]] if read else []


def step_advantages(
    states: Sequence[Sequence[State]],
    outcomes: Sequence[float | None],
    *,
    discount: float,
    similarity: float,
    by_std: bool = True,
) -> list[list[float]]:
    """Return A_S per trajectory and turn of one group (section 4.2, eq. 6 to 8).

    `states` are those before each turn; None in `outcomes` is a failed trajectory, which gets 0.
    """
    valid = [of_one for of_one, outcome in zip(states, outcomes, strict=True) if outcome is not None]
    first_of = cluster({state for of_one in valid for state in of_one}, similarity=similarity)
    members: dict[State, list[tuple[int, int, float]]] = {}
    for i, (of_one, outcome) in enumerate(zip(states, outcomes, strict=True)):
        if outcome is None:
            continue
        for t, state in enumerate(of_one):
            value = discount ** (len(of_one) - 1 - t) * outcome
            members.setdefault(first_of[state], []).append((i, t, value))
    advantages = [[0.0] * len(of_one) for of_one in states]
    for of_cluster in members.values():
        values = group_advantages([value for *_, value in of_cluster], by_std=by_std)
        for (i, t, _), value in zip(of_cluster, values, strict=True):
            advantages[i][t] = value
    return advantages


def cluster(states: Collection[State], *, similarity: float) -> dict[State, State]:
    """Return the first state of the cluster of each state.

    A state joins the first cluster whose first state it is like, as in the authors' code. Similarity is not
    transitive, so that the result depends on the order: here that of the texts, not of the trajectories.
    """
    first_of: dict[State, State] = {}
    for state in sorted(states):
        firsts = dict.fromkeys(first_of.values())
        first_of[state] = next((first for first in firsts if first.is_like(state, similarity)), state)
    return first_of

"""GiGPO: group-in-group advantages, of episodes and of steps taken in the same state (arXiv 2505.10978).

A(i, t) = A_E(i) + w * A_S(i, t). A_E is the advantage of the outcome within the group. A_S compares the
discounted outcome, `discount^(T-1-t) * R`, between turns of the group that were sampled after the same
observation; a turn without a like gets 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from verl.algorithms.base import Algorithm
from verl.algorithms.statistics import group_advantages, spread_turns
from verl.trainer.config.schema import AlgorithmConfig, not_negative, one_of, share
from verl.types import Credit, Group, Score, Trajectory


@dataclass
class GiGPOConfig(AlgorithmConfig):
    """Settings of `algorithm=gigpo`; the defaults are those of the paper's search experiments."""

    name: str = "gigpo"
    gamma: float = share(0.95)
    step_advantage_w: float = not_negative(1.0)
    mode: str = one_of("mean_std_norm", "mean_norm")
    similarity_thresh: float = share(0.9)
    """Observations of at least this SequenceMatcher ratio are one state; 1 for equal texts only."""


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
        by_std = settings.mode == "mean_std_norm" and settings.norm_adv_by_std_in_grpo
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


def states_before(trajectory: Trajectory) -> list[str]:
    """Return the observation that the policy read last before each turn; empty before the first one."""
    read = ["\n".join(each.text for each in turn.observations) for turn in trajectory.turns]
    return ["", *read[:-1]] if read else []


def step_advantages(
    states: Sequence[Sequence[str]],
    outcomes: Sequence[float | None],
    *,
    discount: float,
    similarity: float,
    by_std: bool = True,
) -> list[list[float]]:
    """Return A_S per trajectory and turn of one group (section 4.2, eq. 6 to 8).

    `states` has the observation before each turn, None in `outcomes` a failed trajectory, which gets 0. The
    first turns of all trajectories share the state of the question. Other turns share a state with the first
    earlier one whose observation is similar enough, as in the authors' clustering.
    """
    clusters: list[tuple[tuple[bool, str], list[tuple[int, int, float]]]] = []
    for i, (of_one, outcome) in enumerate(zip(states, outcomes, strict=True)):
        if outcome is None:
            continue
        for t, text in enumerate(of_one):
            state = (t == 0, text)
            members = next((m for key, m in clusters if _is_same(key, state, similarity)), None)
            if members is None:
                clusters.append((state, members := []))
            members.append((i, t, discount ** (len(of_one) - 1 - t) * outcome))
    advantages = [[0.0] * len(of_one) for of_one in states]
    for _, members in clusters:
        for (i, t, _), value in zip(
            members, group_advantages([value for *_, value in members], by_std=by_std), strict=True
        ):
            advantages[i][t] = value
    return advantages


def _is_same(one: tuple[bool, str], other: tuple[bool, str], similarity: float) -> bool:
    if one == other:
        return True
    if one[0] or other[0] or similarity >= 1.0:
        return False
    matcher = SequenceMatcher(None, one[1], other[1])
    return matcher.quick_ratio() >= similarity and matcher.ratio() >= similarity

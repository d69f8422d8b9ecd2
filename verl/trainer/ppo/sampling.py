"""Dynamic sampling: ask further questions in the place of groups whose outcomes are all equal (DAPO)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from verl.trainer.config.schema import FilterGroupsConfig
from verl.types import Group, Question, Score, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The groups of a step."""

    groups: list[Group]
    """Those that are trained on."""
    left_out: list[Group] = field(default_factory=list)
    """Those that were played as well."""
    stats: dict[str, float] = field(default_factory=dict)
    """What filtering did, by metric name."""


async def collect_groups(
    questions: Sequence[Question],
    *,
    collect: Callable[[Sequence[Question]], Awaitable[list[Group]]],
    more_questions: Callable[[], Sequence[Question]],
    judge: Callable[[Sequence[Trajectory]], Sequence[Score]],
    settings: FilterGroupsConfig,
) -> Collected:
    """Return the groups of a step.

    Without filtering these are the groups of `questions`. With it, groups whose outcomes are all equal are
    left out and further batches are asked until there are as many groups as questions, or
    `max_num_gen_batches` were asked: then the step has fewer groups, or, if none differs, those of the first
    batch (arXiv 2503.14476, eq. 11).
    """
    groups = await collect(questions)
    if not settings.enable:
        return Collected(groups=groups)
    asked = {group.question.uid for group in groups}
    played = list(groups)
    kept = [group for group in groups if has_contrast(group, judge)]
    batches = 1
    while len(kept) < len(questions) and batches < settings.max_num_gen_batches:
        # A question twice in one step would be the same episodes: their seeds are those of step and question.
        further = [question for question in more_questions() if question.uid not in asked]
        asked.update(question.uid for question in further)
        found = await collect(further)
        kept += [group for group in found if has_contrast(group, judge)]
        played += found
        batches += 1
    if len(kept) < len(questions):
        logger.warning(
            "after %d batches only %d of %d groups have outcomes that differ; "
            "algorithm.filter_groups.max_num_gen_batches=%d",
            batches,
            len(kept),
            len(questions),
            settings.max_num_gen_batches,
        )
    stats = {
        "rollout/generation_batches": float(batches),
        "rollout/filtered_group_share": (len(played) - len(kept)) / len(played),
    }
    trained = (kept or groups)[: len(questions)]
    uids = {group.question.uid for group in trained}
    left_out = [group for group in played if group.question.uid not in uids]
    return Collected(groups=trained, left_out=left_out, stats=stats)


def has_contrast(group: Group, judge: Callable[[Sequence[Trajectory]], Sequence[Score]]) -> bool:
    """Return whether the outcomes of a group differ; failed trajectories have none."""
    outcomes = {score.outcome for score in judge(group.trajectories) if score.outcome is not None}
    return len(outcomes) > 1

"""Methods for tests, by name and settings, with what they measure with handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.fakes import CharTokenizer
from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Algorithm, Entailment, IGService, LogProbScorer, Services
from verl.types import Credit, Group, Score, Trajectory


def join_titles(trajectory: Trajectory) -> str:
    return " | ".join(passage.title for passage in trajectory.passages)


def make_method(
    name: str = "search_r1",
    *,
    ig_service: IGService | None = None,
    policy: LogProbScorer | None = None,
    entailment: Entailment | None = None,
    answer_wrapper: str | None = None,
    render_context: Callable[[Trajectory], str] = join_titles,
    **settings: object,
) -> Algorithm:
    method = ALGORITHMS[name]
    services = Services(
        render_context=render_context,
        ig_service=ig_service,
        codec=CharTokenizer(),
        answer_wrapper=answer_wrapper or method.answer_wrapper,
        policy=policy,
        entailment=entailment,
    )
    return method(method.settings_class(**settings), services)  # type: ignore[arg-type]


def credit_group(
    method: Algorithm, trajectories: Sequence[Trajectory], scores: Sequence[Score]
) -> list[Credit]:
    """Credit the trajectories of one question."""
    group = Group(question=trajectories[0].question, trajectories=tuple(trajectories))
    return method.credit([group], [scores])[0]

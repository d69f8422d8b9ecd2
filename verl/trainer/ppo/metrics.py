"""Compute the metrics of a step, `{area/what: number}`, from its facts: pure functions.

Areas: rollout reward ig credit policy time perf val. Every number is finite or absent: what could not be
measured is left out, never 0. Shares are in [0, 1], lengths in tokens. Failed trajectories count in the
failure metrics only.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from statistics import fmean

import numpy as np

from serving.answers import AnswerRule, find_answer
from verl.types import (
    ActionKind,
    Finish,
    FloatArray,
    Gain,
    IntArray,
    Sample,
    Score,
    ScoredGroups,
    SpanKind,
    Stop,
    Trajectory,
    count_policy_tokens,
    find_rightness,
)
from verl.utils.failures import failure_name

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
Played = tuple[Trajectory, Score]
REPEATED_TOKENS = 4
"""Length of the sequences whose repetition is counted."""


def step_metrics(
    scored: ScoredGroups,
    *,
    update: Mapping[str, float],
    seconds: Mapping[str, float],
    rollout_s: float,
    left_out: Sequence[Played] = (),
) -> Metrics:
    """Return everything logged of one training step.

    `seconds`: wall seconds per phase, `step` the whole. `rollout_s`: those of the episodes of this step,
    which may have run beside the training of the step before.
    `left_out` was played and filtered away: it counts in what the policy did and how well it answered.
    """
    samples = scored.samples()
    trained = [(sample.trajectory, sample.score) for sample in samples]
    played = [*trained, *left_out]
    trajectories = [trajectory for trajectory, _ in played]
    return finite(
        {
            **rollout_metrics(trajectories),
            **length_by_outcome(played),
            **reward_metrics(samples),
            **outcome_metrics([score for _, score in played]),
            **count_ungraded(played),
            **gain_metrics(trained),
            **scored.stats,
            **credit_metrics(scored),
            **{f"policy/{name}": value for name, value in update.items()},
            **time_metrics(
                trajectories,
                seconds,
                rollout_s=rollout_s,
                trained=[sample.trajectory for sample in samples],
            ),
        }
    )


def finite(metrics: Mapping[str, float | None]) -> Metrics:
    """Leave out what is None (not measured) or not finite (named in the log)."""
    known = {name: float(value) for name, value in metrics.items() if value is not None}
    broken = sorted(name for name, value in known.items() if not math.isfinite(value))
    if broken:
        logger.warning("left out of the metrics because not finite: %s", ", ".join(broken))
    return {name: value for name, value in known.items() if math.isfinite(value)}


def rollout_metrics(trajectories: Sequence[Trajectory]) -> Metrics:
    """Return what the policy did: searches, actions, endings, lengths; and what failed, by name."""
    played = [t for t in trajectories if t.stop is not Stop.FAILED]
    failures = Counter(failure_name(t.failure or "unnamed") for t in trajectories if t.stop is Stop.FAILED)
    return finite(
        {
            "rollout/trajectories": len(trajectories),
            "rollout/failed_share": _ratio(len(trajectories) - len(played), len(trajectories)),
            **{f"rollout/failures_{name}": count for name, count in sorted(failures.items())},
            **_action_metrics(played),
            **_query_metrics(played),
            **_length_metrics(played),
        }
    )


def _action_metrics(played: Sequence[Trajectory]) -> dict[str, float | None]:
    turns = [turn for t in played for turn in t.turns]
    searches = [len(t.observations) for t in played]
    empty = sum(not found.text and not found.passages for t in played for found in t.observations)
    invalid = [turn for turn in turns if turn.action.kind is ActionKind.INVALID]
    return {
        "rollout/turns_mean": mean([len(t.turns) for t in played]),
        "rollout/searches_mean": mean(searches),
        "rollout/no_search_share": mean([count == 0 for count in searches]),
        "rollout/empty_search_share": _ratio(empty, sum(searches)),
        "rollout/valid_action_share": mean([turn.action.kind is not ActionKind.INVALID for turn in turns]),
        "rollout/malformed_actions": float(sum(turn.finish is Finish.STOP for turn in invalid)),
        "rollout/cut_completions": float(sum(turn.finish is Finish.LENGTH for turn in turns)),
        "rollout/cut_share": mean([turn.finish is Finish.LENGTH for turn in turns]),
        "rollout/finished_share": mean([t.stop is Stop.ANSWERED for t in played]),
        "rollout/answer_share": mean([bool(t.answer) for t in played]),
        "rollout/budget_stops": float(sum(t.stop is Stop.BUDGET for t in played)),
        "rollout/length_stops": float(sum(t.stop is Stop.LENGTH for t in played)),
        "rollout/truncated_observations": float(sum(turn.observation_truncated for turn in turns)),
        "rollout/overflowed_observations": float(sum(turn.observation_overflowed for turn in turns)),
        "rollout/dropped_observations": float(sum(len(turn.replacement_ids) > 0 for turn in turns)),
    }


def _query_metrics(played: Sequence[Trajectory]) -> dict[str, float | None]:
    """Return the shares of executed queries that are new to their episode, and that give an answer away."""
    distinct, leaks = 0, []
    for trajectory in played:
        queries = list(executed_queries(trajectory))
        distinct += len({" ".join(text.lower().split()) for text, _ in queries})
        leaks += [names_unread_gold(text, read, golds=trajectory.question.golds) for text, read in queries]
    return {
        "rollout/distinct_query_share": _ratio(distinct, len(leaks)),
        "rollout/gold_in_query_share": mean(leaks),
    }


def executed_queries(trajectory: Trajectory) -> Iterator[tuple[str, list[str]]]:
    """Yield each executed query with what the policy had read when it wrote it: question and passages."""
    read = [trajectory.question.text]
    for turn in trajectory.turns:
        if turn.observations:
            yield from ((s.text, list(read)) for s in turn.action.spans if s.kind is SpanKind.QUERY)
        read += [f"{passage.title} {passage.text}" for passage in turn.passages]


def names_unread_gold(query: str, read: Sequence[str], *, golds: Sequence[str]) -> bool:
    """Return whether a query contains a gold answer that nothing read before it contains."""
    rule = AnswerRule.folded
    return find_answer([query], golds, rule=rule) is not None and find_answer(read, golds, rule=rule) is None


def _length_metrics(played: Sequence[Trajectory]) -> dict[str, float | None]:
    sampled = [t.num_policy_tokens for t in played]
    observed = [sum(len(turn.observation_ids) for turn in t.turns) for t in played]
    seconds = [t.seconds for t in played]
    return {
        "rollout/response_length_mean": mean(sampled),
        "rollout/response_length_max": max(sampled, default=None),
        "rollout/repetition_share": repetition_share([turn.output_ids for t in played for turn in t.turns]),
        "rollout/observation_length_mean": mean(observed),
        "rollout/prompt_length_mean": mean([len(t.prompt_ids) for t in played]),
        "rollout/mask_coverage": _ratio(sum(sampled), sum(sampled) + sum(observed)),
        "rollout/episode_seconds_mean": mean(seconds),
        "rollout/episode_seconds_max": max(seconds, default=None),
    }


def repetition_share(completions: Sequence[IntArray]) -> float | None:
    """Return the share of `REPEATED_TOKENS` tokens in a row that occurred before in the same completion."""
    distinct, count = 0, 0
    for ids in completions:
        tokens = ids.tolist()
        stretches = list(zip(*(tokens[k:] for k in range(REPEATED_TOKENS)), strict=False))
        distinct, count = distinct + len(set(stretches)), count + len(stretches)
    return _ratio(count - distinct, count)


def length_by_outcome(played: Sequence[Played]) -> Metrics:
    """Return the mean length of right answers (if not measured, of full outcomes) and of wrong ones."""
    lengths: dict[str, list[int]] = {"right": [], "wrong": []}
    for trajectory, score in played:
        if score.outcome is not None:
            rightness = find_rightness(score.metrics)
            is_right = (score.outcome if rightness is None else rightness) >= 1.0
            lengths["right" if is_right else "wrong"].append(trajectory.num_policy_tokens)
    return finite({f"rollout/response_length_{name}_mean": mean(found) for name, found in lengths.items()})


def reward_metrics(samples: Sequence[Sample]) -> Metrics:
    """Return the reward trained on, over valid samples."""
    return finite(_spread("reward/", _numbers(samples, "reward")))


def outcome_metrics(scores: Sequence[Score]) -> Metrics:
    """Return outcome, em, sub_em and f1 over all that were judged, and the share that failed."""
    judged = [score for score in scores if score.outcome is not None]
    names = sorted({name for score in judged for name in score.metrics})
    return finite(
        {
            "reward/outcome_mean": mean([s.outcome for s in judged if s.outcome is not None]),
            **{
                f"reward/{name}_mean": mean([s.metrics[name] for s in judged if name in s.metrics])
                for name in names
            },
            "reward/failed_share": _ratio(sum(s.failure is not None for s in scores), len(scores)),
        }
    )


def count_ungraded(played: Sequence[Played]) -> Metrics:
    """Return the number of answers whose outcome could not be measured, by name."""
    failures = Counter(
        failure_name(score.failure or "unnamed")
        for trajectory, score in played
        if trajectory.stop is not Stop.FAILED and score.outcome is None
    )
    return {f"reward/failures_{name}": float(count) for name, count in sorted(failures.items())}


def gain_metrics(scores: Sequence[Played]) -> Metrics:
    """Return gains over all that was measured, per turn or per trajectory; failures as a share of both."""
    played = [score for trajectory, score in scores if trajectory.stop is not Stop.FAILED]
    measured = [score.gain.values for score in played if score.gain.values and score.failure is None]
    gains = [value for values in measured for value in values]
    graded = [score for score in played if score.outcome is not None]
    failures = Counter(failure_name(score.failure) for score in graded if score.failure is not None)
    by_turn = zip_longest(*(score.gain.turns for score in played if score.failure is None))
    return finite(
        {
            **_spread("ig/gain_", gains),
            **{
                f"ig/gain_turn_{number}_mean": mean([gain for gain in of_turn if gain is not None])
                for number, of_turn in enumerate(by_turn, start=1)
            },
            **{
                f"ig/gain_{tool}_mean": mean(of_tool)
                for tool, of_tool in gains_by_tool((t, s.gain) for t, s in scores if s.failure is None)
            },
            "ig/positive_share": mean([gain > 0 for gain in gains]),
            "ig/measured_share": _ratio(len(measured), len(played)),
            "ig/failed_share": _ratio(failures.total(), len(measured) + failures.total()),
            **{f"ig/failures_{name}": count for name, count in sorted(failures.items())},
        }
    )


def gains_by_tool(gains: Iterable[tuple[Trajectory, Gain]]) -> list[tuple[str, list[float]]]:
    """Return the gains of turns by the tool that the turn called, where methods measure turns."""
    found: dict[str, list[float]] = {}
    for trajectory, gain in gains:
        for turn, value in zip(trajectory.turns, gain.turns, strict=False):
            # The calls of a turn are measured together, so that its gain is that of each tool in it.
            for tool in {call.tool for call in turn.action.calls if turn.observations}:
                if value is not None:
                    found.setdefault(tool, []).append(value)
    return sorted(found.items())


def credit_metrics(scored: ScoredGroups) -> Metrics:
    """Return the share of groups without any advantage, the size of the advantages, and the components.

    Failed samples count nowhere, and a group in which all failed is none without advantage. The peak of a
    sample is its largest absolute advantage.
    """
    samples = scored.samples()
    groups = [[s for s in group if s.score.failure is None] for group in scored.by_group()]
    all_peaks = [[float(np.abs(s.credit.advantages).max(initial=0.0)) for s in group] for group in groups]
    peaks = [of_group for of_group in all_peaks if of_group]
    lone = sum(len(group) < 2 for group in groups)
    names = sorted({name for s in samples for name in s.credit.components} - {"reward", "outcome", "gain"})
    return finite(
        {
            "credit/zero_advantage_share": mean([not any(of_group) for of_group in peaks]),
            "credit/lone_group_share": _ratio(lone, len(groups)),
            "credit/advantage_peak_mean": mean([peak for of_group in peaks for peak in of_group]),
            "credit/advantage_abs_max": max((peak for of_group in peaks for peak in of_group), default=None),
            **{f"credit/{name}_mean": mean(_numbers(samples, name)) for name in names},
            **_advantage_metrics(samples),
        }
    )


def _advantage_metrics(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Return mean and mean size of the advantage per sampled token, by kind of token."""
    parts: dict[str, list[FloatArray]] = {}
    for trajectory, score, credit in samples:
        if score.failure is None:
            for kind, values in split_by_kind(trajectory, credit.advantages):
                parts.setdefault(kind, []).append(values)
    joined = {kind: np.concatenate(values).astype(np.float64) for kind, values in parts.items()}
    known = {kind: values for kind, values in joined.items() if len(values)}
    return {
        **{f"credit/advantage_{kind}_mean": float(values.mean()) for kind, values in known.items()},
        **{
            f"credit/advantage_{kind}_abs_mean": float(np.abs(values).mean())
            for kind, values in known.items()
        },
    }


def split_by_kind(trajectory: Trajectory, values: FloatArray) -> Iterator[tuple[str, FloatArray]]:
    """Yield the values of the sampled tokens [L] by the kind of the span around them, or `other`."""
    start = len(trajectory.prompt_ids)
    for turn in trajectory.turns:
        of_turn = values[start : start + len(turn.output_ids)]
        done = 0
        for span in turn.action.spans:
            yield "other", of_turn[done : span.start]
            yield str(span.kind), of_turn[span.start : span.end]
            done = span.end
        yield "other", of_turn[done:]
        start += len(turn.output_ids) + len(turn.observation_ids)


def time_metrics(
    trajectories: Sequence[Trajectory],
    seconds: Mapping[str, float],
    *,
    rollout_s: float,
    trained: Sequence[Trajectory],
) -> Metrics:
    """Return seconds per phase, and the throughput of those phases that were timed."""
    num_sampled = count_policy_tokens(trajectories)
    num_trained = sum(len(t.token_ids) for t in trained if t.stop is not Stop.FAILED)
    return finite(
        {
            **{f"time/{name}_s": value for name, value in seconds.items()},
            "perf/sampled_tokens_per_s": _ratio(num_sampled, rollout_s),
            "perf/tokens_per_s": _ratio(num_trained, seconds.get("step", 0.0)),
            "perf/trajectories_per_s": _ratio(len(trajectories), seconds.get("step", 0.0)),
        }
    )


def _numbers(samples: Sequence[Sample], name: str) -> list[float]:
    """Return all numbers of a component, of trajectories or of turns, over the samples that did not fail."""
    values: list[float] = []
    for sample in (s for s in samples if s.score.failure is None):
        component = sample.credit.components.get(name)
        parts = component if isinstance(component, tuple) else (component,)
        values += [value for value in parts if value is not None]
    return values


def _spread(prefix: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        f"{prefix}mean": mean(values),
        f"{prefix}min": min(values, default=None),
        f"{prefix}max": max(values, default=None),
    }


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return fmean(values) if values else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None

"""What a method's credit does to the incentive to search, against the exact policy gradient of a small game.

The game: at each of at most T turns the policy searches with probability p = 1/2 (one logit per turn) or
answers, which ends the episode; after T searches it must answer. A search at turn t pays a gain of 0 or
2 m_t, each with probability 1/2; an answer pays nothing. Gains are positive on average, so more search is
always right. The gradient on the logit of turn t is

    g_t = E[ A_t * d log pi(a_t) / d logit_t ],     d log pi / d logit = 1 - p for a search, -p for an answer

With the true return-to-go as A_t it is the policy gradient; with the advantages of a method it is what the
method does instead. A group has n episodes. Because credit does not depend on their order, groups are
enumerated as multisets, and every expectation is exact.

    python -m verl.algorithms.bias          # prints the table and the lines of docs/methods.md
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np

from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Algorithm, Services
from verl.trainer.config.schema import ANSWER_PLACE
from verl.types import (
    Action,
    ActionKind,
    Gain,
    Group,
    Observation,
    Question,
    Score,
    Span,
    SpanKind,
    Stop,
    ToolCall,
    Trajectory,
    Turn,
)

MEANS = (0.6, 0.3, 0.1, 0.05)
"""m_t, the mean gain of a search at each turn."""
SEARCH_PROBABILITY = 0.5
Placement = Literal["turns", "cumulative", "terminal", "trajectory", "outcome"]
"""Where a method reads the gains of the game: per turn; per turn the sum of the gains up to it; per turn, and
minus their sum on the last turn; their sum as the gain of the trajectory; or their sum as the outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One way to play the game."""

    gains: tuple[float, ...]
    """Of its searches, in order."""
    probability: float


def episodes(means: Sequence[float] = MEANS) -> list[Episode]:
    """Return every episode of the game; their probabilities sum to 1."""
    found = []
    for count in range(len(means) + 1):
        answers = 1.0 if count == len(means) else 1.0 - SEARCH_PROBABILITY
        actions = SEARCH_PROBABILITY**count * answers
        for gains in itertools.product(*((0.0, 2.0 * mean) for mean in means[:count])):
            found.append(Episode(gains=gains, probability=actions / 2**count))
    return found


def groups_of(played: Sequence[Episode], *, n: int) -> Iterator[tuple[tuple[Episode, ...], float]]:
    """Yield every group of n episodes, without regard to order, and its probability."""
    for chosen in itertools.combinations_with_replacement(range(len(played)), n):
        orders = math.factorial(n)
        for times in Counter(chosen).values():
            orders //= math.factorial(times)
        group = tuple(played[i] for i in chosen)
        yield group, orders * math.prod(episode.probability for episode in group)


def true_gradient(means: Sequence[float] = MEANS) -> list[float]:
    """Return the policy gradient of each turn's logit: p^t (1 - p) times the value of searching there."""
    p = SEARCH_PROBABILITY
    value = 0.0  # expected gains from the next turn on
    gradient = []
    for t in reversed(range(len(means))):
        gradient.append(p**t * p * (1.0 - p) * (means[t] + value))
        value = p * (means[t] + value)
    return gradient[::-1]


def method_gradient(
    algorithm: Algorithm,
    *,
    placement: Placement,
    n: int,
    means: Sequence[float] = MEANS,
) -> list[float]:
    """Return the expected gradient of each turn's logit with the advantages of a method."""
    total = np.zeros(len(means))
    for group, probability in groups_of(episodes(means), n=n):
        total += probability * _gradient(algorithm, group, placement=placement, num_turns=len(means))
    result: list[float] = total.tolist()
    return result


def sampled_gradient(
    algorithm: Algorithm,
    *,
    placement: Placement,
    n: int,
    num_groups: int,
    seed: int = 0,
    means: Sequence[float] = MEANS,
) -> tuple[list[float], list[float]]:
    """Return the gradient of each turn's logit over sampled groups and its standard error."""
    rng = np.random.default_rng(seed)
    played = episodes(means)
    weights = np.array([episode.probability for episode in played])
    rows = np.array(
        [
            _gradient(
                algorithm,
                [played[i] for i in rng.choice(len(played), size=n, p=weights)],
                placement=placement,
                num_turns=len(means),
            )
            for _ in range(num_groups)
        ]
    )
    return rows.mean(0).tolist(), (rows.std(0, ddof=1) / math.sqrt(num_groups)).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method with settings, and where it reads the gains of the game."""

    name: str
    placement: Placement
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the method and its settings as code of Markdown."""
        return f"`{' '.join([self.name, *(f'{key}={value}' for key, value in self.settings.items())])}`"


VARIANTS = (
    Variant(name="search_r1", placement="outcome"),
    Variant(name="search_r1", placement="outcome", settings={"norm_adv_by_std_in_grpo": False}),
    Variant(name="search_r1", placement="outcome", settings={"adv_estimator": "rloo"}),
    Variant(name="search_r1", placement="outcome", settings={"adv_estimator": "reinforce_plus_plus"}),
    Variant(
        name="search_r1", placement="outcome", settings={"adv_estimator": "reinforce_plus_plus_baseline"}
    ),
    Variant(name="inforeasoner", placement="trajectory"),
    Variant(name="inforeasoner", placement="turns", settings={"granularity": "turn"}),
    Variant(
        name="inforeasoner",
        placement="cumulative",
        settings={"granularity": "turn", "turn_baseline": "no_retrieval"},
    ),
    Variant(name="ig_search", placement="turns"),
    Variant(name="igpo", placement="turns"),
    Variant(name="igpo", placement="turns", settings={"info_gain_norm_mode": "joint"}),
    Variant(name="igpo", placement="turns", settings={"info_gain_norm_mode": "scaled_separate"}),
    Variant(name="igpo", placement="turns", settings={"info_gain_norm_mode": "raw_ig", "gamma": 0.0}),
    Variant(name="igpo", placement="turns", settings={"baseline": "leave_one_out"}),
    Variant(name="tips", placement="turns"),
    Variant(name="tips", placement="turns", settings={"scale": "fixed", "alpha": 1.0}),
    Variant(name="tips", placement="terminal", settings={"scale": "fixed", "alpha": 1.0, "terminal": True}),
    Variant(name="siop", placement="turns"),
    Variant(name="gigpo", placement="outcome"),
    Variant(name="gigpo", placement="outcome", settings={"mode": "mean_norm"}),
    Variant(name="stepsearch", placement="turns"),
    Variant(name="cw_grpo", placement="turns"),
)


def verdict(gradient: Sequence[float], truth: Sequence[float]) -> str:
    """Return in words how a gradient compares with the true one, whose parts are all positive."""
    ratios = [value / true for value, true in zip(gradient, truth, strict=True)]
    size = max(abs(ratio) for ratio in ratios)
    if size < _ROUNDING:
        return "no gradient while outcomes are equal"
    if max(ratios) - min(ratios) < _ROUNDING:
        return "unbiased"
    against = [str(t) for t, ratio in enumerate(ratios, 1) if ratio < -_ROUNDING * size]
    if against:
        return f"biased against searching at turn {', '.join(against)}"
    without = [str(t) for t, ratio in enumerate(ratios, 1) if ratio < _ROUNDING * size]
    return f"no gradient at turn {', '.join(without)}" if without else "biased in size, not in sign"


@cache
def exact_gradients(*, n: int = 3) -> Mapping[str, list[float]]:
    """Return the gradient of every variant in groups of n, by its label."""
    gradients = {}
    for variant in VARIANTS:
        method = ALGORITHMS[variant.name]
        algorithm = method(method.settings_class(**variant.settings), _NO_SERVICES)  # type: ignore[arg-type]
        gradients[variant.label] = method_gradient(algorithm, placement=variant.placement, n=n)
    return gradients


def bias_line(name: str) -> str:
    """Return the line of docs/methods.md with the verdicts on the variants of a method."""
    truth, gradients = true_gradient(), exact_gradients()
    labels = [variant.label for variant in VARIANTS if variant.name == name]
    verdicts = "; ".join(f"{label}: {verdict(gradients[label], truth)}" for label in labels)
    return f"Incentive to search: {verdicts}."


def bias_table() -> str:
    """Return the table of docs/methods.md: the exact gradient of every variant and its verdict."""
    truth = true_gradient()
    rows = [("exact policy gradient", truth, "")]
    rows += [(label, gradient, verdict(gradient, truth)) for label, gradient in exact_gradients().items()]
    turns = range(1, len(truth) + 1)
    lines = [
        f"| credit | {' | '.join(f'turn {t}' for t in turns)} | verdict |",
        "| --- |" + " ---: |" * len(truth) + " --- |",
    ]
    for label, gradient, words in rows:
        numbers = " | ".join(f"{value:+.3f}" for value in gradient)
        lines.append(f"| {label} | {numbers} | {words} |")
    return "\n".join(lines).replace("-0.000", "+0.000")


class _NoCodec:
    """Encodes nothing: crediting asks for no log-prob."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError(text)

    def decode(self, ids: Sequence[int]) -> str:
        raise AssertionError(ids)


_NO_SERVICES = Services(render_context=lambda _: "", codec=_NoCodec(), answer_wrapper=ANSWER_PLACE)
_ROUNDING = 1e-6
"""Rounding of float32 advantages, relative."""
_QUESTION = Question(uid="toy/0", text="Who?", messages=(), golds=("x",), data_source="toy")


def _gradient(
    algorithm: Algorithm, played: Sequence[Episode], *, placement: Placement, num_turns: int
) -> np.ndarray:
    """Return the mean over a group of A_t * d log pi(a_t) / d logit_t [T]."""
    group = Group(question=_QUESTION, trajectories=tuple(itertools.starmap(_trajectory, enumerate(played))))
    (credits,) = algorithm.credit([group], [[_score(episode, placement) for episode in played]])
    total = np.zeros(num_turns)
    for episode, credit in zip(played, credits, strict=True):
        advantages = credit.advantages[1::2]  # the tokens: prompt, then action and observation of each turn
        for t in range(min(len(episode.gains) + 1, num_turns)):
            searched = t < len(episode.gains)
            total[t] += float(advantages[t]) * (1.0 - SEARCH_PROBABILITY if searched else -SEARCH_PROBABILITY)
    return total / len(played)


@cache
def _score(episode: Episode, placement: Placement) -> Score:
    total = math.fsum(episode.gains)
    if placement == "outcome":
        return Score(outcome=total)
    if placement == "trajectory":
        return Score(outcome=0.0, gain=Gain(trajectory=total))
    gains = itertools.accumulate(episode.gains) if placement == "cumulative" else episode.gains
    return Score(outcome=0.0, gain=Gain(turns=(*gains, -total if placement == "terminal" else None)))


@cache
def _trajectory(sample: int, episode: Episode) -> Trajectory:
    """Return an episode as a trajectory with one token per action and observation."""
    token = np.ones(1, dtype=np.int32)
    log_prob = np.zeros(1, dtype=np.float32)

    def turn(kind: SpanKind, number: int) -> Turn:
        searched = kind is SpanKind.QUERY
        return Turn(
            output_ids=token,
            output_log_probs=log_prob,
            action=Action(
                kind=ActionKind.TOOL if searched else ActionKind.ANSWER,
                calls=(ToolCall(tool="search", arguments={"query": "q"}),) if searched else (),
                spans=(Span(kind=kind, start=0, end=1, text="q"),),
            ),
            observations=(Observation(text=str(number)),) if searched else (),
            observation_ids=token + number if searched else token[:0],
        )

    searches = [turn(SpanKind.QUERY, t) for t in range(len(episode.gains))]
    return Trajectory(
        question=_QUESTION,
        sample=sample,
        prompt_ids=token,
        turns=(*searches, turn(SpanKind.ANSWER, len(searches))),
        stop=Stop.ANSWERED,
    )


if __name__ == "__main__":
    sys.stdout.write("\n\n".join([bias_table(), *map(bias_line, ALGORITHMS)]) + "\n")

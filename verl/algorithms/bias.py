"""What a method's credit does to the incentive to search, against the exact policy gradient of a small game.

The game: at each of at most T turns the policy searches with probability p (one logit per turn) or answers,
which ends the episode; after T searches it must answer. A search at turn t pays a gain of 0 or 2 m_t, each
with probability 1/2; an answer pays nothing. Gains are positive on average, so more search is always right.
The gradient on the logit of turn t is

    g_t = E[ A_t * d log pi(a_t) / d logit_t ],     d log pi / d logit = 1 - p for a search, -p for an answer

with the true return-to-go as A_t it is the policy gradient; with the advantages of a method it is what the
method does instead. A group has n episodes. Because credit does not depend on their order, groups are
enumerated as multisets, and every expectation is exact.

    python -m verl.algorithms.bias          # prints the table of docs/methods.md
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Algorithm, Services
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
Placement = Literal["turns", "so_far", "trajectory", "outcome"]
"""Where a method reads the gains of the game: per turn, per turn the sum up to it, their sum per trajectory,
or as the outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One way to play the game."""

    gains: tuple[float, ...]
    """Of its searches, in order."""
    probability: float


def episodes(means: Sequence[float] = MEANS, p: float = SEARCH_PROBABILITY) -> list[Episode]:
    """Return every episode of the game; their probabilities sum to 1."""
    found = []
    for count in range(len(means) + 1):
        actions = p**count * (1.0 if count == len(means) else 1.0 - p)
        for gains in itertools.product(*((0.0, 2.0 * mean) for mean in means[:count])):
            found.append(Episode(gains=gains, probability=actions / 2**count))
    return found


def groups_of(plays: Sequence[Episode], *, n: int) -> Iterator[tuple[tuple[Episode, ...], float]]:
    """Yield every group of n episodes, without regard to order, and its probability."""
    for chosen in itertools.combinations_with_replacement(range(len(plays)), n):
        orders = math.factorial(n)
        for times in Counter(chosen).values():
            orders //= math.factorial(times)
        group = tuple(plays[i] for i in chosen)
        yield group, orders * math.prod(play.probability for play in group)


def true_gradient(means: Sequence[float] = MEANS, p: float = SEARCH_PROBABILITY) -> list[float]:
    """Return the policy gradient of each turn's logit: p^t (1 - p) times what searching on is worth there."""
    worth = 0.0  # expected gains from the next turn on
    gradient = []
    for t in reversed(range(len(means))):
        gradient.append(p**t * p * (1.0 - p) * (means[t] + worth))
        worth = p * (means[t] + worth)
    return gradient[::-1]


def method_gradient(
    algorithm: Algorithm,
    *,
    placement: Placement,
    n: int,
    means: Sequence[float] = MEANS,
    p: float = SEARCH_PROBABILITY,
) -> list[float]:
    """Return the expected gradient of each turn's logit with the advantages of a method."""
    total = np.zeros(len(means))
    for plays, probability in groups_of(episodes(means, p), n=n):
        total += probability * _gradient(algorithm, plays, placement=placement, means=means, p=p)
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
    p: float = SEARCH_PROBABILITY,
) -> tuple[list[float], list[float]]:
    """Return the gradient of each turn's logit over sampled groups and its standard error."""
    rng = np.random.default_rng(seed)
    plays = episodes(means, p)
    weights = np.array([play.probability for play in plays])
    rows = np.array(
        [
            _gradient(
                algorithm,
                [plays[i] for i in rng.choice(len(plays), size=n, p=weights)],
                placement=placement,
                means=means,
                p=p,
            )
            for _ in range(num_groups)
        ]
    )
    return rows.mean(0).tolist(), (rows.std(0, ddof=1) / math.sqrt(num_groups)).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method with settings, and how it reads the gains of the game."""

    name: str
    placement: Placement
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the words that choose it on the command line."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


VARIANTS = (
    Variant(name="search_r1", placement="outcome"),
    Variant(name="search_r1", placement="outcome", settings={"norm_adv_by_std_in_grpo": False}),
    Variant(name="search_r1", placement="outcome", settings={"adv_estimator": "rloo"}),
    Variant(name="search_r1", placement="outcome", settings={"adv_estimator": "reinforce_plus_plus"}),
    Variant(name="inforeasoner", placement="trajectory"),
    Variant(name="inforeasoner", placement="turns", settings={"granularity": "turn"}),
    Variant(
        name="inforeasoner",
        placement="so_far",
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
    Variant(name="siop", placement="turns"),
    Variant(name="gigpo", placement="outcome"),
    Variant(name="stepsearch", placement="turns"),
    Variant(name="cw_grpo", placement="turns"),
)


def verdict(gradient: Sequence[float], truth: Sequence[float]) -> str:
    """Return in words how a gradient stands to the true one, whose parts are all positive."""
    ratios = [value / true for value, true in zip(gradient, truth, strict=True)]
    size = max(abs(ratio) for ratio in ratios)
    if size < _ZERO:
        return "none: gains that all share are not seen"
    if max(ratios) - min(ratios) < _ZERO:
        return "unbiased"
    against = [str(t) for t, ratio in enumerate(ratios, 1) if ratio < -_ZERO * size]
    if against:
        return f"biased: against searching at turn {', '.join(against)}"
    blind = [str(t) for t, ratio in enumerate(ratios, 1) if ratio < _ZERO * size]
    return f"biased: blind at turn {', '.join(blind)}" if blind else "biased in size, not in sign"


def bias_table(variants: Sequence[Variant] = VARIANTS, *, n: int = 3) -> str:
    """Return the table of docs/methods.md: the exact gradient of every variant in groups of n."""
    truth = true_gradient()
    rows = [("exact policy gradient", truth, "")]
    for variant in variants:
        method = ALGORITHMS[variant.name]
        algorithm = method(method.settings_class(**variant.settings), _NO_SERVICES)  # type: ignore[arg-type]
        gradient = method_gradient(algorithm, placement=variant.placement, n=n)
        rows.append((f"`{variant.label}`", gradient, verdict(gradient, truth)))
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


_NO_SERVICES = Services(render_context=lambda _: "", codec=_NoCodec())
_ZERO = 1e-6
"""Rounding of float32 advantages, relative."""


def _gradient(
    algorithm: Algorithm,
    plays: Sequence[Episode],
    *,
    placement: Placement,
    means: Sequence[float],
    p: float,
) -> np.ndarray:
    """Return the mean over a group of A_t * d log pi(a_t) / d logit_t [T]."""
    question = Question(uid="toy/0", text="Who?", messages=(), golds=("x",), data_source="toy")
    group = Group(
        question=question,
        trajectories=tuple(_trajectory(question, i, play) for i, play in enumerate(plays)),
    )
    scores = [_score(play, placement) for play in plays]
    (credits,) = algorithm.credit([group], [scores])
    total = np.zeros(len(means))
    for play, credit in zip(plays, credits, strict=True):
        advantages = credit.advantages[1::2]  # the tokens: prompt, then action and observation of each turn
        for t in range(min(len(play.gains) + 1, len(means))):
            searched = t < len(play.gains)
            total[t] += float(advantages[t]) * (1.0 - p if searched else -p)
    return total / len(plays)


def _score(play: Episode, placement: Placement) -> Score:
    total = math.fsum(play.gains)
    if placement == "outcome":
        return Score(outcome=total)
    if placement == "trajectory":
        return Score(outcome=0.0, gain=Gain(trajectory=total))
    gains = play.gains if placement == "turns" else itertools.accumulate(play.gains)
    return Score(outcome=0.0, gain=Gain(turns=(*gains, None)))


def _trajectory(question: Question, sample: int, play: Episode) -> Trajectory:
    """Return an episode as a trajectory with one token per action and observation."""
    token = np.ones(1, dtype=np.int32)
    log_prob = np.zeros(1, dtype=np.float32)

    def turn(kind: SpanKind, observations: tuple[Observation, ...]) -> Turn:
        searched = kind is SpanKind.QUERY
        return Turn(
            output_ids=token,
            output_log_probs=log_prob,
            action=Action(
                kind=ActionKind.TOOL if searched else ActionKind.ANSWER,
                calls=(ToolCall(tool="search", arguments={"query": "q"}),) if searched else (),
                spans=(Span(kind=kind, start=0, end=1, text="q"),),
            ),
            observations=observations,
            observation_ids=token if searched else token[:0],
        )

    searches = [
        turn(SpanKind.QUERY, (Observation(text=f"found at turn {t}"),)) for t in range(len(play.gains))
    ]
    return Trajectory(
        question=question,
        sample=sample,
        prompt_ids=token,
        turns=(*searches, turn(SpanKind.ANSWER, ())),
        stop=Stop.ANSWERED,
    )


if __name__ == "__main__":
    sys.stdout.write(bias_table() + "\n")

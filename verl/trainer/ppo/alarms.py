"""Alarms: warnings about metrics that left their limits, found in the history of a run. None stops it.

The limits are the settings `trainer.alarms`; each warning has the value, the limit, its key and what to do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verl.trainer.config.alarms import AlarmsConfig

History = Sequence[Mapping[str, float]]
"""Metrics of the steps so far, oldest first; the last step is the one that is judged."""

GAIN, EM = "ig/gain_mean", "reward/em_mean"
MISMATCH_STEPS = 2
"""Steps in a row in which log-probs of engine and trainer differ by more than the limit."""
TREND_ERRORS = 2.0
"""Standard errors by which gain must rise and EM fall to be a trend and no noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A bound that a metric must not pass for some steps in a row."""

    metric: str
    bound: float
    setting: str
    """Key of the bound."""
    steps: int
    advice: str
    is_upper: bool = True
    is_ratio: bool = False
    """Whether the bound is a multiple of the metric's first value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A warning about one step."""

    name: str
    """The same for each step at which the same is wrong."""
    message: str


class Alarms:
    """Watches the metrics of one run; an alarm that lasts is repeated from time to time only."""

    def __init__(
        self,
        settings: AlarmsConfig,
        *,
        max_turns: int,
        max_log_prob_difference: float | None,
        history: Sequence[Mapping[str, object]] = (),
    ) -> None:
        """Continue after `history`, the logged metrics of earlier steps, where a run is resumed.

        `max_log_prob_difference` between engine and trainer; None where an update lies between the two.
        """
        self._settings = settings
        self._limits = make_limits(
            settings, max_turns=max_turns, max_log_prob_difference=max_log_prob_difference
        )
        self._watched = {GAIN, EM, *(limit.metric for limit in self._limits)}
        self._history = [self._select(line) for line in history]
        self._raised: dict[str, int] = {}
        """Step of the last warning of each alarm."""

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings due at this step; each alarm at most every `repeat_steps` steps."""
        self._history.append(self._select(metrics))
        found = find_alarms(self._history, self._limits, trend_steps=self._settings.trend_steps)
        due = [
            alarm
            for alarm in found
            if alarm.name not in self._raised
            or step - self._raised[alarm.name] >= self._settings.repeat_steps
        ]
        self._raised |= {alarm.name: step for alarm in due}
        return [alarm.message for alarm in due]

    def _select(self, metrics: Mapping[str, object]) -> dict[str, float]:
        return {
            name: value
            for name in self._watched
            if isinstance(value := metrics.get(name), (int, float)) and math.isfinite(value)
        }


def find_alarms(history: History, limits: Sequence[Limit], *, trend_steps: int | None) -> list[Alarm]:
    """Return what is wrong at the last step of the history. A metric that it lacks gives no alarm."""
    found = [check_limit(history, limit) for limit in limits]
    if trend_steps is not None:
        found.append(check_trend(history, steps=trend_steps))
    return [alarm for alarm in found if alarm is not None]


def check_limit(history: History, limit: Limit) -> Alarm | None:
    """Return an alarm if the metric was beyond its bound in the last `limit.steps` steps that have it."""
    values = [metrics[limit.metric] for metrics in history if limit.metric in metrics]
    last = values[-limit.steps :]
    if len(last) < limit.steps or limit.metric not in history[-1]:
        return None
    bound = limit.bound * values[0] if limit.is_ratio else limit.bound
    is_beyond = all(value > bound if limit.is_upper else value < bound for value in last)
    if not is_beyond or (limit.is_ratio and values[0] <= 0):
        return None
    side = "above" if limit.is_upper else "below"
    multiple = f", {limit.bound:g} times its first value {values[0]:.4g}," if limit.is_ratio else ""
    message = (
        f"{limit.metric} is {last[-1]:.4g}, {side} {bound:.4g}{multiple} for {limit.steps} steps "
        f"({limit.setting}): {limit.advice}"
    )
    return Alarm(name=f"{limit.setting} {side}", message=message)


def check_trend(history: History, *, steps: int) -> Alarm | None:
    """Return an alarm if over the last steps the gain rose while EM fell, both by more than noise."""
    recent = history[-steps:]
    gains = [metrics[GAIN] for metrics in recent if GAIN in metrics]
    scores = [metrics[EM] for metrics in recent if EM in metrics]
    if min(len(gains), len(scores)) < steps:
        return None
    if find_change(gains) < TREND_ERRORS or find_change(scores) > -TREND_ERRORS:
        return None
    (low, high), (good, bad) = ([statistics.fmean(half) for half in _halve(v)] for v in (gains, scores))
    setting = "trainer.alarms.trend_steps"
    return Alarm(
        name=setting,
        message=f"over {steps} steps {GAIN} rose from {low:.4g} to {high:.4g} while {EM} fell from "
        f"{good:.4g} to {bad:.4g} ({setting}): the policy collects gain without answering better; look at "
        "the highest gains in the report, and lower the weight of the gain or stop the run",
    )


def find_change(values: Sequence[float]) -> float:
    """Return the mean of the later half minus that of the earlier half, in standard errors."""
    early, late = _halve(values)
    difference = statistics.fmean(late) - statistics.fmean(early)
    error = math.sqrt((statistics.variance(early) + statistics.variance(late)) / len(early))
    if error == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error


def _halve(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return the first and the last half; of an odd number the one in the middle is left out."""
    half = len(values) // 2
    return values[:half], values[-half:]


def make_limits(
    settings: AlarmsConfig, *, max_turns: int, max_log_prob_difference: float | None
) -> tuple[Limit, ...]:
    """Return the limits of a run. An episode has at most `max_turns` turns with a call and one more."""
    limits = []
    for rule in _RULES:
        value: float | None = getattr(settings, rule.setting.removeprefix("trainer.alarms."))
        if value is None:
            continue
        bounds = [(value, rule.is_upper)]
        if rule.setting == "trainer.alarms.max_turn_share":
            # Of two turns a good policy may use both.
            bounds = [(value * (max_turns + 1), True)] if max_turns > 1 else []
        if rule.is_distance:
            bounds = [(1 + value, True), (1 - value, False)]
        limits += [
            Limit(
                metric=rule.metric,
                setting=rule.setting,
                bound=bound,
                is_upper=is_upper,
                is_ratio=rule.is_ratio,
                steps=settings.steps,
                advice=rule.advice,
            )
            for bound, is_upper in bounds
        ]
    if max_log_prob_difference is None:
        return tuple(limits)
    mismatch = Limit(
        metric="policy/log_prob_difference_mean",
        setting="actor_rollout_ref.rollout.max_log_prob_difference",
        bound=max_log_prob_difference,
        steps=MISMATCH_STEPS,
        advice=f"rollout/trainer mismatch: {_MISMATCH}",
    )
    return (*limits, mismatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """Which metric a setting limits, and what to do about it."""

    metric: str
    setting: str
    advice: str
    is_upper: bool = True
    is_ratio: bool = False
    is_distance: bool = False
    """Whether the setting is a largest distance from 1."""


_ACTOR = "actor_rollout_ref.actor"
_LOWER_LR = f"lower {_ACTOR}.optim.lr"
_MISMATCH = (
    "the engine samples from another policy than the one that is trained; compare precision, temperature and "
    "model of the two"
)
_RULES = (
    _Rule(
        metric="rollout/no_search_share",
        setting="trainer.alarms.max_no_search_share",
        advice="the policy has stopped searching; look at the trajectories of this step",
    ),
    _Rule(
        metric="rollout/turns_mean",
        setting="trainer.alarms.max_turn_share",
        advice="nearly every episode uses all its turns; look whether the last searches still help, and "
        "raise max_turns or lower what a search is rewarded with",
    ),
    _Rule(
        metric="rollout/distinct_query_share",
        setting="trainer.alarms.min_distinct_query_share",
        is_upper=False,
        advice="episodes repeat their own queries; look at what the retriever returns for them",
    ),
    _Rule(
        metric="rollout/gold_in_query_share",
        setting="trainer.alarms.max_gold_in_query_share",
        advice="queries name a gold answer that the policy has not read: it searches for what it knows "
        "already; look at the queries before you trust the gain",
    ),
    _Rule(
        metric="rollout/cut_share",
        setting="trainer.alarms.max_cut_share",
        advice="completions are cut at the token limit; raise data.max_response_length if they make sense",
    ),
    _Rule(
        metric="rollout/repetition_share",
        setting="trainer.alarms.max_repetition_share",
        advice=f"completions repeat themselves; {_LOWER_LR} and go on from an earlier checkpoint",
    ),
    _Rule(
        metric="rollout/response_length_mean",
        setting="trainer.alarms.max_length_ratio",
        is_ratio=True,
        advice=f"responses grow; look whether they make sense, and at {_ACTOR}.loss_agg_mode, which decides "
        "what length weighs in the loss",
    ),
    _Rule(
        metric="policy/entropy",
        setting="trainer.alarms.min_entropy_ratio",
        is_upper=False,
        is_ratio=True,
        advice=f"the policy hardly explores any more; {_LOWER_LR} or raise {_ACTOR}.entropy_coeff",
    ),
    _Rule(
        metric="policy/entropy",
        setting="trainer.alarms.max_entropy_ratio",
        is_ratio=True,
        advice=f"the policy becomes random; {_LOWER_LR} or {_ACTOR}.entropy_coeff, and go on from an "
        "earlier checkpoint",
    ),
    _Rule(
        metric="policy/kl",
        setting="trainer.alarms.max_kl",
        advice=f"the policy is far from the reference; {_LOWER_LR} or raise {_ACTOR}.kl_loss_coef",
    ),
    _Rule(
        metric="policy/ratio_mean",
        setting="trainer.alarms.max_ratio_distance",
        is_distance=True,
        advice=f"an update moves the policy far from the one that sampled; {_LOWER_LR} or raise "
        f"{_ACTOR}.ppo_mini_batch_size",
    ),
    _Rule(
        metric="policy/clip_fraction",
        setting="trainer.alarms.max_clip_fraction",
        advice=f"a large part of the update is clipped away; {_LOWER_LR} or raise "
        f"{_ACTOR}.ppo_mini_batch_size",
    ),
    _Rule(
        metric="policy/importance_mean",
        setting="trainer.alarms.max_importance_distance",
        is_distance=True,
        advice=f"{_MISMATCH}; where steps are sampled ahead (trainer.schedule), {_LOWER_LR}",
    ),
    _Rule(
        metric="credit/zero_advantage_share",
        setting="trainer.alarms.max_zero_advantage_share",
        advice="at nearly every question all attempts have advantage 0, so that the update hardly changes "
        "the policy; take harder or easier questions, or raise actor_rollout_ref.rollout.n_agent",
    ),
    _Rule(
        metric="ig/answer_log_prob_mean",
        setting="trainer.alarms.min_answer_log_prob",
        is_upper=False,
        advice="the policy does not write answers in the text in which they are scored, so that gains say "
        "little; set reward.answer_wrapper to how it writes them",
    ),
)

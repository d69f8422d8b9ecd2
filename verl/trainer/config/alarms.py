"""The section `trainer.alarms`."""

from __future__ import annotations

from dataclasses import dataclass

from verl.trainer.config.fields import positive, setting, share


@dataclass
class AlarmsConfig:
    """Limits of metrics beyond which a step logs a warning; null: no such warning."""

    steps: int = positive(5)
    repeat_steps: int = positive(20)
    trend_steps: int | None = setting(20, lambda value: value >= 4, "at least 4")
    max_no_search_share: float | None = share(0.9)
    max_turn_share: float | None = share(0.95)
    min_distinct_query_share: float | None = share(0.7)
    max_gold_in_query_share: float | None = share(0.3)
    max_cut_share: float | None = share(0.3)
    max_repetition_share: float | None = share(0.5)
    max_length_ratio: float | None = positive(3.0)
    min_entropy_ratio: float | None = share(0.1)
    max_entropy_ratio: float | None = positive(3.0)
    max_kl: float | None = positive(1.0)
    max_ratio_distance: float | None = positive(0.1)
    max_clip_fraction: float | None = share(0.3)
    max_importance_distance: float | None = positive(0.1)
    max_zero_advantage_share: float | None = share(0.9)
    min_answer_log_prob: float | None = setting(-7.0, lambda value: value < 0, "below 0")

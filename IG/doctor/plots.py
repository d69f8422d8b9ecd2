"""The doctor's two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from IG.doctor.noise import NoiseReport
from IG.doctor.scenarios import LABELS, Scenario
from serving.plotting import BLUE, GREEN, GREY, ORANGE, STYLE

GainsByScenario = Mapping[str, Mapping[Scenario, Sequence[float]]]
"""Gains by kind of question, then by scenario."""


def draw_estimation_error(noise: NoiseReport, path: Path, *, gain: str) -> None:
    """Error of the gain against the number of samples, both logarithmic."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.7), layout="constrained")
        axes = figure.subplots()
        _draw_levels(axes, noise)
        if noise.signal:
            third = noise.signal / 3
            axes.axhline(third, color=GREY, linewidth=1, linestyle=":")
            axes.annotate(
                f"a third of the signal: {third:.3f}",
                (noise.levels[-1].num_samples, third),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=GREY,
                fontsize=8.5,
            )
        sizes = [level.num_samples for level in noise.levels]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(_ticks(axes))
        axes.set_xlabel("samples per condition")
        axes.set_ylabel(f"RMS error of the gain ({gain})")
        axes.set_title(f"Estimation error, {noise.num_gains} contexts", loc="left", fontsize=10)
        axes.legend(loc="lower left", frameon=True, edgecolor="none", framealpha=0.85)
        figure.savefig(path, dpi=110)


def draw_gain_by_scenario(gains: GainsByScenario, path: Path, *, gain: str) -> None:
    """A box per scenario, one panel per kind of question: quartiles, 5 to 95 %, and every gain as a dot."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.8 + 3.1 * len(gains), 3.7), layout="constrained")
        widths = [len(scenarios) for scenarios in gains.values()]
        panels = figure.subplots(1, len(gains), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (kind, scenarios) in zip(panels, gains.items(), strict=True):
            _draw_boxes(axes, scenarios)
            count = max(len(values) for values in scenarios.values())
            axes.set_title(f"{kind}, {count} questions", loc="left", fontsize=10)
        panels[0].set_ylabel(f"information gain ({gain})")
        figure.savefig(path, dpi=110)


def _draw_levels(axes: Axes, noise: NoiseReport) -> None:
    def points(field: str) -> tuple[list[int], list[float]]:
        known = [(level.num_samples, getattr(level, field)) for level in noise.levels]
        kept = [(size, value) for size, value in known if value]
        return [size for size, _ in kept], [value for _, value in kept]

    axes.plot(*points("error"), "o-", color=BLUE, label=f"against {noise.max_samples} samples")
    sizes, values = points("noise")
    axes.plot(sizes, values, "s-", color=ORANGE, label="against the truth (estimate)")
    axes.plot(*points("jackknife"), "^--", color=GREEN, label="standard error of the service")
    if sizes:
        anchor = values[-1] * np.sqrt(sizes[-1])
        span = np.asarray([noise.levels[0].num_samples, noise.levels[-1].num_samples])
        axes.plot(span, anchor / np.sqrt(span), color=GREY, linewidth=1, label="1/sqrt(samples)")


def _ticks(axes: Axes) -> list[float]:
    low, high = axes.get_ylim()
    steps = [digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)]
    return [step for step in steps if low <= step <= high]


def _draw_boxes(axes: Axes, scenarios: Mapping[Scenario, Sequence[float]]) -> None:
    rng = np.random.default_rng(0)
    axes.axhline(0, color="#9aa3ad", linewidth=1)
    places = np.arange(1, len(scenarios) + 1)
    axes.boxplot(
        [np.asarray(values) for values in scenarios.values()],
        positions=places,
        widths=0.55,
        whis=(5, 95),
        showfliers=False,
        medianprops={"color": ORANGE, "linewidth": 2},
        boxprops={"color": BLUE},
        whiskerprops={"color": BLUE},
        capprops={"color": BLUE},
    )
    for place, values in zip(places, scenarios.values(), strict=True):
        spread = place + rng.uniform(-0.2, 0.2, size=len(values))
        axes.plot(spread, values, ".", color=BLUE, alpha=0.25, markersize=4)
    axes.set_xticks(places, ["\n".join(LABELS[name].rsplit(" ", 1)) for name in scenarios])
    axes.grid(axis="x", visible=False)

"""Curves as inline SVG: small, printable, no script, no network; colours by Okabe and Ito."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from serving.plotting import BLUE, GREEN, GREY, ORANGE, STYLE
from verl.run.report.run_data import RunData, Series

PHASE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a7f00", "#5b6470")
SMOOTHING = 5
MIN_STEPS_TO_SMOOTH = 10
MAX_BARS = 80
SVG_STYLE = {**STYLE, "svg.fonttype": "none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric in a chart: a line over training steps or the dots of evaluations."""

    label: str
    metric: str
    colour: str = BLUE
    kind: str = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    title: str
    curves: tuple[Curve, ...]
    meaning: str
    has_zero_line: bool = False


CHARTS = (
    Chart(
        title="Exact match",
        curves=(
            Curve(label="sampled, training questions", metric="reward/em_mean"),
            Curve(label="greedy, held-out questions", metric="val/em", colour=ORANGE, kind="val"),
        ),
        meaning="Share of questions answered with one of the accepted answers.",
    ),
    Chart(
        title="Information gain",
        curves=(Curve(label="mean gain", metric="ig/gain_mean", colour=GREEN),),
        meaning="How much more a frozen model believes in the right answer after the search.",
        has_zero_line=True,
    ),
    Chart(
        title="Reward",
        curves=(Curve(label="mean", metric="reward/mean"),),
        meaning="What attempts at a question are compared by: the outcome and what the method adds.",
    ),
    Chart(
        title="KL to the reference",
        curves=(Curve(label="per sampled token", metric="policy/kl", colour=GREY),),
        meaning="How far the policy has moved from where it started.",
    ),
    Chart(
        title="Entropy",
        curves=(Curve(label="nats per sampled token", metric="policy/entropy", colour=GREY),),
        meaning="How undecided the policy is; a fall to zero ends exploration.",
    ),
    Chart(
        title="Response length",
        curves=(
            Curve(label="sampled tokens per attempt", metric="rollout/response_length_mean", colour=GREY),
        ),
        meaning="Tokens the policy wrote, without what it read.",
    ),
    Chart(
        title="Searches per question",
        curves=(
            Curve(label="sampled, training questions", metric="rollout/searches_mean"),
            Curve(label="greedy, held-out questions", metric="val/searches_mean", colour=ORANGE, kind="val"),
        ),
        meaning="Searches that were executed.",
    ),
)


def draw_curves(run: RunData) -> list[tuple[str, str, str]]:
    """(title, meaning, SVG) of every chart that has data, the seconds per phase last."""
    drawn = []
    for chart in CHARTS:
        found = [(curve, run.series(curve.metric, kind=curve.kind)) for curve in chart.curves]
        kept = [(curve, series) for curve, series in found if series.steps]
        if kept:
            drawn.append((chart.title, chart.meaning, _draw_lines(chart, kept)))
    phases = _phases(run)
    if phases:
        drawn.append(("Seconds per phase", "Where the time of a step goes.", _draw_phases(phases)))
    return drawn


def _phases(run: RunData) -> dict[str, Series]:
    names = [name for name in run.names() if name.startswith("time/") and name != "time/step_s"]
    return {
        name.removeprefix("time/").removesuffix("_s").replace("_", " "): run.series(name) for name in names
    }


def _draw_lines(chart: Chart, curves: Sequence[tuple[Curve, Series]]) -> str:
    with mpl.rc_context({**SVG_STYLE, "svg.hashsalt": chart.title}):
        figure, axes = _new_figure()
        if chart.has_zero_line:
            axes.axhline(0, color="#9aa3ad", linewidth=1)
        for curve, series in curves:
            _draw_curve(axes, curve, series)
        if len(curves) > 1:
            axes.legend(loc="best")
        else:
            axes.set_ylabel(curves[0][0].label)
        summary = "; ".join(f"{curve.label}: {_ends(series)}" for curve, series in curves)
        return _as_svg(figure, description=f"{chart.title}. {summary}.")


def _draw_curve(axes: Axes, curve: Curve, series: Series) -> None:
    if curve.kind == "val":
        axes.plot(
            series.steps,
            series.values,
            "o--",
            color=curve.colour,
            markersize=5,
            linewidth=1,
            label=curve.label,
        )
    elif len(series.steps) < MIN_STEPS_TO_SMOOTH:
        axes.plot(series.steps, series.values, ".-", color=curve.colour, linewidth=1.6, label=curve.label)
    else:
        axes.plot(series.steps, series.values, color=curve.colour, alpha=0.3, linewidth=1)
        axes.plot(
            series.steps, moving_mean(series.values), color=curve.colour, linewidth=2, label=curve.label
        )


def _draw_phases(phases: dict[str, Series]) -> str:
    with mpl.rc_context({**SVG_STYLE, "svg.hashsalt": "phases"}):
        figure, axes = _new_figure(right=0.72)
        steps = sorted({step for series in phases.values() for step in series.steps})
        bins = np.array_split(np.array(steps), min(len(steps), MAX_BARS))
        centres = [float(chunk.mean()) for chunk in bins]
        width = (centres[1] - centres[0]) * 0.9 if len(centres) > 1 else 0.9
        bottom = np.zeros(len(bins))
        for index, (name, series) in enumerate(phases.items()):
            values = dict(zip(series.steps, series.values, strict=True))
            heights = np.array([np.mean([values.get(int(step), 0.0) for step in chunk]) for chunk in bins])
            colour = PHASE_COLOURS[index % len(PHASE_COLOURS)]
            axes.bar(
                centres, heights, width, bottom=bottom, color=colour, label=f"{name} {heights.mean():.1f} s"
            )
            bottom += heights
        axes.set_ylabel("seconds")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True, handlelength=1)
        means = "; ".join(
            f"{name} {np.mean(series.values):.1f} s" for name, series in phases.items() if series.values
        )
        return _as_svg(figure, description=f"Mean seconds per phase: {means}.")


def moving_mean(values: Sequence[float], window: int = SMOOTHING) -> list[float]:
    """Centred mean, narrower at the ends."""
    half = window // 2
    return [float(np.mean(values[max(0, k - half) : k + half + 1])) for k in range(len(values))]


def _new_figure(*, right: float = 0.985) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.35))  # fixed margins: fitting them takes half of the time
    axes = figure.subplots(gridspec_kw={"left": 0.125, "right": right, "bottom": 0.185, "top": 0.96})
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _ends(series: Series) -> str:
    values, steps = series.values, series.steps
    return f"{values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}"


def _as_svg(figure: Figure, *, description: str) -> str:
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(font: [\d.]+px )[^;\"]*", r"\1system-ui, sans-serif", svg)
    opening = re.search(r'viewBox="[^"]+"', svg)
    assert opening is not None
    label = f'role="img" aria-label="{escape(description)}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {opening.group()} {label}'
    return start + svg[svg.index(">") :].replace("xlink:href", "href")

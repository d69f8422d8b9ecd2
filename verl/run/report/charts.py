"""Curves as inline SVG: small, printable, without script or network; colors by Okabe and Ito."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from serving.plotting import BLUE, COLORS, GREEN, GREY, ORANGE, STYLE
from verl.run.report.run_data import RunData, Series
from verl.types import SpanKind

PHASE_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a7f00", "#5b6470")
SMOOTHING = 5
MIN_STEPS_TO_SMOOTH = 10
MAX_BARS = 80
LINE_STYLES = ("-", "--", ":")
"""Of curves with the same color."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric in a chart: a line over training steps, or the dots of evaluations."""

    label: str
    metric: str
    color: str = BLUE
    style: str = "-"
    kind: str = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves in one picture."""

    title: str
    curves: tuple[Curve, ...]
    meaning: str
    has_zero_line: bool = False


def _pair(train_metric: str, val_metric: str) -> tuple[Curve, Curve]:
    return (
        Curve(label="sampled, training questions", metric=train_metric),
        Curve(label="greedy, held-out questions", metric=val_metric, color=ORANGE, kind="val"),
    )


CHARTS = (
    Chart(
        title="Equal expressions",
        curves=_pair("reward/math_mean", "val/math"),
        meaning="Share of questions whose answer equals the gold answer as an expression.",
    ),
    Chart(
        title="Exact match",
        curves=_pair("reward/em_mean", "val/em"),
        meaning="Share of questions answered with one of the accepted answers.",
    ),
    Chart(
        title="Information gain",
        curves=(Curve(label="mean gain", metric="ig/gain_mean", color=GREEN),),
        meaning="Mean gain of the searches, as the method measures it.",
        has_zero_line=True,
    ),
    Chart(
        title="Positive gains",
        curves=(Curve(label="share of measured gains", metric="ig/positive_share", color=GREEN),),
        meaning="Share of all gains that are above 0.",
    ),
    Chart(
        title="Log-prob of the gold answer",
        curves=(
            Curve(label="with the documents found", metric="ig/log_prob_real_mean"),
            Curve(
                label="with those of other questions",
                metric="ig/log_prob_counterfactual_mean",
                color=ORANGE,
            ),
        ),
        meaning="Mean per token under the policy; the distance is the gain.",
    ),
    Chart(
        title="Log-prob of the likeliest answer",
        curves=(Curve(label="per token", metric="ig/answer_log_prob_mean"),),
        meaning="Of the answers that are scored; low where the policy never writes reward.answer_wrapper.",
    ),
    Chart(
        title="Support of the answers",
        curves=(Curve(label="probability of entailment", metric="ig/support_mean"),),
        meaning="Of the answers by what was read; near 0 where the service's model does not judge passages.",
    ),
    Chart(
        title="Reward",
        curves=(Curve(label="mean", metric="reward/mean"),),
        meaning="What attempts at a question are compared by: the outcome and what the method adds.",
    ),
    Chart(
        title="KL to the reference",
        curves=(Curve(label="per sampled token", metric="policy/kl", color=GREY),),
        meaning="How far the policy has moved from where it started.",
    ),
    Chart(
        title="Entropy",
        curves=(Curve(label="nats per sampled token", metric="policy/entropy", color=GREY),),
        meaning="How undecided the policy is; a fall to zero ends exploration.",
    ),
    Chart(
        title="Response length",
        curves=(
            Curve(label="sampled tokens per attempt", metric="rollout/response_length_mean", color=GREY),
        ),
        meaning="Tokens the policy wrote, without what it read.",
    ),
    Chart(
        title="Searches per question",
        curves=_pair("rollout/searches_mean", "val/searches_mean"),
        meaning="Searches that were executed.",
    ),
    Chart(
        title="Share of the limit of the GPUs",
        curves=(
            Curve(label="FLOP, update", metric="perf/update_flops_share"),
            Curve(label="FLOP, log-probs", metric="perf/log_probs_flops_share", color=ORANGE),
            Curve(label="bandwidth, rollout", metric="perf/rollout_bandwidth_share", color=GREEN),
        ),
        meaning="Of the FLOP per second in bfloat16, and of the memory bandwidth, of all GPUs.",
    ),
)


TOKEN_KINDS = (*map(str, SpanKind), "other")


def _list_families(run: RunData) -> list[Chart]:
    """Return the charts with a curve per turn or per kind of token, as far as the run has these."""
    found = (re.fullmatch(r"ig/gain_turn_(\d+)_mean", name) for name in run.names())
    turns = sorted(int(match[1]) for match in found if match)
    of_turns = [(f"turn {k}", f"ig/gain_turn_{k}_mean") for k in turns]
    return [
        _family(
            "Gain per turn",
            of_turns,
            meaning="Mean over the attempts in which the gain of that turn was measured.",
        ),
        _family(
            "Advantage by kind of token",
            [(kind, f"credit/advantage_{kind}_mean") for kind in TOKEN_KINDS],
            meaning="Mean per token; above 0 such tokens become more likely. Tags are other.",
        ),
        _family(
            "Size of the advantage by kind of token",
            [(kind, f"credit/advantage_{kind}_abs_mean") for kind in TOKEN_KINDS],
            meaning="Mean absolute value per token; where the update is large.",
        ),
    ]


def _family(title: str, metrics: Sequence[tuple[str, str]], *, meaning: str) -> Chart:
    curves = [
        Curve(
            label=label,
            metric=name,
            color=COLORS[k % len(COLORS)],
            style=LINE_STYLES[k // len(COLORS) % len(LINE_STYLES)],
        )
        for k, (label, name) in enumerate(metrics)
    ]
    return Chart(title=title, curves=tuple(curves), meaning=meaning, has_zero_line=True)


def draw_curves(run: RunData) -> list[tuple[str, str, str]]:
    """Return (title, meaning, SVG) of every chart that has data."""
    drawn = []
    for chart in (*CHARTS, *_list_families(run)):
        found = [(curve, run.series(curve.metric, kind=curve.kind)) for curve in chart.curves]
        if kept := [(curve, series) for curve, series in found if series.steps]:
            drawn.append((chart.title, chart.meaning, _draw_lines(chart, kept)))
    return drawn


def draw_phases(run: RunData) -> str | None:
    """Return the seconds of every phase over the steps as SVG; None where none was timed."""
    names = [name for name in run.names() if name.startswith("time/") and name != "time/step_s"]
    labels = (name.removeprefix("time/").removesuffix("_s").replace("_", "-") for name in names)
    phases = dict(zip(labels, map(run.series, names), strict=True))
    return _draw_phases(phases) if phases else None


def _draw_lines(chart: Chart, curves: Sequence[tuple[Curve, Series]]) -> str:
    is_crowded = len(curves) > 2
    with new_figure(chart.title, right=0.8 if is_crowded else 0.985) as (figure, axes):
        if chart.has_zero_line:
            axes.axhline(0, color="#9aa3ad", linewidth=1)
        for curve, series in curves:
            _draw_curve(axes, curve, series)
        if is_crowded:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1)
        elif len(curves) > 1:
            axes.legend(loc="best")
        else:
            axes.set_ylabel(curves[0][0].label)
        ends = (
            f"{curve.label}: {s.values[0]:.3g} at step {s.steps[0]}, {s.values[-1]:.3g} at step {s.steps[-1]}"
            for curve, s in curves
        )
        return as_svg(figure, description=f"{chart.title}. {'; '.join(ends)}.")


def _draw_curve(axes: Axes, curve: Curve, series: Series) -> None:
    steps, values = series.steps, series.values
    looks: dict[str, Any] = {"color": curve.color, "label": curve.label}
    if curve.kind == "val":
        axes.plot(steps, values, "o--", markersize=5, linewidth=1, **looks)
        return
    looks["linestyle"] = curve.style
    if len(steps) < MIN_STEPS_TO_SMOOTH:
        axes.plot(steps, values, marker=".", linewidth=1.6, **looks)
    else:
        axes.plot(steps, values, color=curve.color, alpha=0.3, linewidth=1)
        axes.plot(steps, moving_mean(values), linewidth=2, **looks)


def _draw_phases(phases: dict[str, Series]) -> str:
    with new_figure("phases", right=0.72) as (figure, axes):
        steps = sorted({step for series in phases.values() for step in series.steps})
        bins = np.array_split(np.array(steps), min(len(steps), MAX_BARS))
        centers = [float(chunk.mean()) for chunk in bins]
        width = (centers[1] - centers[0]) * 0.9 if len(centers) > 1 else 0.9
        bottom = np.zeros(len(bins))
        for index, (name, series) in enumerate(phases.items()):
            values = dict(zip(series.steps, series.values, strict=True))
            heights = np.array([np.mean([values.get(int(step), 0.0) for step in chunk]) for chunk in bins])
            color, label = PHASE_COLORS[index % len(PHASE_COLORS)], f"{name} {heights.mean():.1f} s"
            axes.bar(centers, heights, width, bottom=bottom, color=color, label=label)
            bottom += heights
        axes.set_ylabel("seconds")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True, handlelength=1)
        means = (f"{name} {np.mean(series.values):.1f} s" for name, series in phases.items() if series.values)
        return as_svg(figure, description=f"Mean seconds per phase: {'; '.join(means)}.")


def moving_mean(values: Sequence[float], window: int = SMOOTHING) -> list[float]:
    """Return the centered mean, over fewer values at the ends."""
    half = window // 2
    return [float(np.mean(values[max(0, k - half) : k + half + 1])) for k in range(len(values))]


@contextmanager
def new_figure(name: str, *, right: float = 0.985, x_label: str = "step") -> Iterator[tuple[Figure, Axes]]:
    """Give a figure in the style of the reports; its axes end at this share of the width."""
    with mpl.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(5.2, 2.35))  # fixed margins: fitting them takes half of the time
        axes = figure.subplots(gridspec_kw={"left": 0.125, "right": right, "bottom": 0.185, "top": 0.96})
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        yield figure, axes


def as_svg(figure: Figure, *, description: str) -> str:
    """Return the figure as an SVG element with a description, without metadata and fonts of this machine."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # not referenced, and the same in all figures of a page
    svg = re.sub(r"(font: [\d.]+px )[^;\"]*", r"\1system-ui, sans-serif", svg)
    view_box = re.search(r'viewBox="[^"]+"', svg)
    assert view_box is not None
    label = f'role="img" aria-label="{escape(description)}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {view_box.group()} {label}'
    return start + svg[svg.index(">") :].replace("xlink:href", "href")

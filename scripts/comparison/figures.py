"""Figures of a comparison as a paper prints them: PDF, PNG, and SVG for the page; seeds are bands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from comparison.plan import Value
from comparison.readings import Runs, band, final_em, smooth
from comparison.results import Curve, Result
from serving.plotting import COLORS, GREY, INK, STYLE
from verl.run.report.charts import LINE_STYLES, as_svg

_PNG_DPI = 160
_WIDTH = 7.0
"""Inches: the text width of a page in two columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure that is written: its file name without ending, a caption, and the SVG for a page."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    title: str
    curve: Callable[[Result], Curve]
    is_share: bool = False


_PANELS = (
    _Panel(title="exact match, sampled", curve=lambda result: smooth(result.em), is_share=True),
    _Panel(title="searches per episode", curve=lambda result: smooth(result.searches)),
    _Panel(title="gain, as the method measures it", curve=lambda result: smooth(result.gain)),
    _Panel(title="entropy, nats per sampled token", curve=lambda result: smooth(result.entropy)),
)
_LINE_COLORS = (INK, *COLORS)
_BAND = "Lines are means over the seeds, bands go from the least to the largest seed"
_SMOOTHED = f"{_BAND}; every point is the mean of 5 steps."


def draw_stage(
    runs: Runs, *, numbers: Mapping[str, int], name: str, base: str | None, folder: Path
) -> list[Picture]:
    """Write EM, searches, gain and entropy of all methods, and EM of each method beside the base.

    Methods with the same number look the same in the figures of all stages.
    """
    pictures = [draw_curves(runs, numbers=numbers, name=f"{name}_curves", folder=folder)]
    if base is not None and base in runs and len(runs) > 1:
        pictures.append(draw_pairs(runs, name=f"{name}_pairs", base=base, folder=folder))
    return pictures


def draw_curves(runs: Runs, *, numbers: Mapping[str, int], name: str, folder: Path) -> Picture:
    """Write four panels over the steps, with a line and a band per method."""
    legend = 0.5 + 0.19 * ceil(len(runs) / 4)
    height = 4.2 + legend
    with open_figure(name, height=height) as figure:
        grid = figure.subplots(2, 2, sharex=True)
        figure.subplots_adjust(
            left=0.07, right=0.985, top=0.95, bottom=legend / height, hspace=0.26, wspace=0.16
        )
        for panel, axes in zip(_PANELS, grid.flat, strict=True):
            bands = {method: band(results, panel.curve) for method, results in runs.items()}
            for method, (steps, values) in bands.items():
                if steps:
                    _draw_band(axes, steps, values, numbers[method])
            if not any(steps for steps, _ in bands.values()):
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
            _finish(axes, panel.title, is_share=panel.is_share)
        for axes in grid[1]:
            axes.set_xlabel("step")
        handles = [
            mpl.lines.Line2D([], [], label=label, linewidth=1.8, **_looks(numbers[label])) for label in runs
        ]
        figure.legend(handles=handles, loc="lower center", ncols=min(4, len(runs)), handlelength=2.2)
        caption = f"Exact match, searches, gain and entropy over the steps. {_SMOOTHED}"
        return write_figure(figure, name=name, caption=caption, folder=folder)


def draw_pairs(runs: Runs, *, name: str, base: str, folder: Path) -> Picture:
    """Write a panel per method: its EM over the steps, and that of the base in grey."""
    methods = [method for method in runs if method != base]
    columns = min(4, len(methods))
    rows = ceil(len(methods) / columns)
    with open_figure(name, height=0.5 + 1.55 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        bottom = 0.42 / (0.5 + 1.55 * rows)
        figure.subplots_adjust(
            left=0.06, right=0.985, top=1 - 0.25 / (0.5 + 1.55 * rows), bottom=bottom, hspace=0.3
        )
        for number, axes in enumerate(grid.flat):
            if number >= len(methods):
                axes.set_visible(False)
                continue
            for label, color in ((base, GREY), (methods[number], COLORS[0])):
                steps, values = band(runs[label], _PANELS[0].curve)
                if steps:
                    axes.plot(steps, values[0], color=color, linewidth=1.5)
                    axes.fill_between(steps, values[1], values[2], color=color, alpha=0.18, linewidth=0)
            _finish(axes, methods[number], is_share=True)
        for axes in list(grid.flat)[max(0, len(methods) - columns) : len(methods)]:
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        caption = f"Exact match of each method (blue) and of {base} (grey). {_SMOOTHED}"
        return write_figure(figure, name=name, caption=caption, folder=folder)


def draw_variation(
    results: Mapping[Value, Sequence[Result]], *, setting: str, method: str, name: str, folder: Path
) -> Picture:
    """Write EM of the last evaluation, and searches, over the values of one setting."""
    with open_figure(name, height=2.6) as figure:
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.08, right=0.985, top=0.9, bottom=0.19, wspace=0.2)
        places: dict[Value, float] = {v: float(v) for v in results if isinstance(v, int | float)}
        if len(places) < len(results):
            places = {value: float(k) for k, value in enumerate(results)}
        measures: tuple[tuple[Axes, str, Callable[[Result], float | None]], ...] = (
            (left, "exact match, greedy, at the end", final_em),
            (right, "searches per question, at the end", _final_searches),
        )
        for axes, title, measure in measures:
            points = [
                (places[value], found)
                for value, of_value in results.items()
                if (found := [m for result in of_value if (m := measure(result)) is not None])
            ]
            points.sort()
            xs = [x for x, _ in points]
            axes.plot(xs, [sum(ys) / len(ys) for _, ys in points], "o-", color=COLORS[0], markersize=4)
            axes.fill_between(
                xs,
                [min(ys) for _, ys in points],
                [max(ys) for _, ys in points],
                color=COLORS[0],
                alpha=0.18,
                linewidth=0,
            )
            for x, ys in points:
                axes.plot([x] * len(ys), ys, ".", color=COLORS[0], alpha=0.45, markersize=5)
            _finish(axes, title, is_share=axes is left)
            axes.set_xlabel(f"{setting} of {method}")
            axes.set_xticks(list(places.values()), [str(value) for value in places])
        caption = f"{method} under different values of {setting}. {_BAND}; dots are seeds."
        return write_figure(figure, name=name, caption=caption, folder=folder)


def _final_searches(result: Result) -> float | None:
    return result.evaluations[-1].searches if result.evaluations else None


def _draw_band(axes: Axes, steps: Sequence[int], values: Any, number: int) -> None:
    looks = _looks(number)
    axes.plot(steps, values[0], linewidth=1.5, **looks)
    axes.fill_between(steps, values[1], values[2], color=looks["color"], alpha=0.1, linewidth=0)


def _looks(number: int) -> dict[str, Any]:
    return {
        "color": _LINE_COLORS[number % len(_LINE_COLORS)],
        "linestyle": LINE_STYLES[number // len(_LINE_COLORS) % len(LINE_STYLES)],
    }


def _finish(axes: Axes, title: str, *, is_share: bool) -> None:
    axes.set_title(title, fontsize=9, loc="left", pad=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    if is_share:
        axes.set_ylim(-0.02, 1.02)


@contextmanager
def open_figure(name: str, *, height: float) -> Iterator[Figure]:
    """Give a figure as wide as a page, in the style of all plots; height in inches."""
    # Type 42: publishers refuse the default fonts of PDF files; fixed salts give the same files again.
    with mpl.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name, "pdf.fonttype": 42}):
        yield Figure(figsize=(_WIDTH, height))


def write_figure(figure: Figure, *, name: str, caption: str, folder: Path) -> Picture:
    """Write PDF and PNG; return the picture for a page."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    figure.savefig(folder / f"{name}.png", dpi=_PNG_DPI, metadata={"Software": None})
    return Picture(name=name, caption=caption, svg=as_svg(figure, description=caption))

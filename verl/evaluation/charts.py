"""The share of right answers against a number of searches or tokens, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib.lines import Line2D

from serving.plotting import COLORS
from verl.evaluation.summary import CURVES, Point
from verl.evaluation.tables import format_bin, format_estimate, title_curve
from verl.run.report.charts import as_svg, new_figure

_SPREAD = 0.5
"""Of the distance between two bins, how far the points of the runs are apart."""


def draw_curves(
    curves: Mapping[str, Mapping[str, Sequence[Point]]], *, measure: str
) -> list[tuple[str, Markup]]:
    """Return title and picture of each of `summary.CURVES` that has points, given by key and run."""
    found = []
    for key, label in CURVES.items():
        if any(curves[key].values()):
            x_label = f"{label.lower()} per answer"
            svg = draw_points(curves[key], title=label, x_label=x_label, measure=measure)
            found.append((title_curve(measure, key), Markup(svg)))
    return found


def draw_points(series: Mapping[str, Sequence[Point]], *, title: str, x_label: str, measure: str) -> str:
    """Return the points of each run with their intervals; the bins are evenly spaced."""
    bins = sorted(
        {(point.low, point.high): format_bin(point) for of in series.values() for point in of}.items()
    )
    places = {ends: place for place, (ends, _) in enumerate(bins)}
    with new_figure(title, x_label=x_label, right=0.985 if len(series) == 1 else 0.72) as (figure, axes):
        lines: list[Line2D] = []
        for number, points in enumerate(series.values()):
            shift = _SPREAD * ((number + 0.5) / len(series) - 0.5)
            xs = [places[point.low, point.high] + shift for point in points]
            ys = [100 * point.estimate.value for point in points]
            color = COLORS[number % len(COLORS)]
            lines += axes.plot(xs, ys, "o-", color=color, markersize=4, linewidth=1.2)
            for x, point in zip(xs, points, strict=True):
                if point.estimate.interval is not None:
                    axes.vlines(x, *(100 * end for end in point.estimate.interval), color=color, alpha=0.5)
                if len(series) == 1:
                    text = f"n={point.estimate.num_questions}"
                    axes.annotate(text, (x, 1), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
        axes.set_xticks(range(len(bins)), [label for _, label in bins])
        axes.set_ylim(-3, 106)
        axes.set_ylabel(f"{measure} in percent")
        if len(series) > 1:
            # Matplotlib reads `$` as a formula, and ignores labels of lines that begin with `_`.
            names = [name.replace("$", r"\$") for name in series]
            axes.legend(lines, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1)
        values = (
            f"{name}: " + ", ".join(f"{format_bin(p)}: {format_estimate(p.estimate)}" for p in points)
            for name, points in series.items()
        )
        return as_svg(figure, description=f"{title}. {'; '.join(values)}.")

"""The picture of `index ceiling`: share of questions answered within the first k passages, over k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter

from search_r1.search.answer_ranks import AnswerRank, by_source, share_within
from serving.plotting import COLORS, INK, STYLE


def draw_ceiling(ranks: Sequence[AnswerRank], path: Path, *, ks: Sequence[int], title: str) -> None:
    """A line per data source and one for all of them, which has its interval of 95 %; marks at `ks`."""
    sources = by_source(ranks)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 4.1), layout="constrained")
        axes = figure.subplots()
        if len(sources) > 1:
            for number, (source, of_source) in enumerate(sources.items()):
                _draw_line(axes, of_source, ks=ks, colour=COLORS[number % len(COLORS)], label=source)
        label = f"all {len(ranks)} questions" if len(sources) > 1 else next(iter(sources))
        _draw_line(axes, ranks, ks=ks, colour=INK, label=label, with_interval=True)
        _draw_axes(axes, ks)
        axes.set_title(title, loc="left", fontsize=10)
        if len(sources) > 1:
            # Below the axes: lines may run anywhere.
            figure.legend(loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=110)


def _draw_line(
    axes: Axes,
    ranks: Sequence[AnswerRank],
    *,
    ks: Sequence[int],
    colour: str,
    label: str,
    with_interval: bool = False,
) -> None:
    depths = list(range(ks[0], ks[-1] + 1))
    shares = {k: share for k in depths if (share := share_within(ranks, k)) is not None}
    if not shares:
        return
    width = 2.0 if with_interval else 1.3
    values = [share.value for share in shares.values()]
    axes.plot(list(shares), values, color=colour, linewidth=width, label=label)
    axes.plot(ks, [shares[k].value for k in ks], "o", color=colour, markersize=2.5 + width)
    if not with_interval:
        return
    low, high = [share.low for share in shares.values()], [share.high for share in shares.values()]
    axes.fill_between(list(shares), low, high, color=colour, alpha=0.12, linewidth=0)
    for k in ks:
        axes.annotate(
            f"{shares[k].value:.1%}",
            (k, shares[k].value),
            xytext=(0, 5),
            textcoords="offset points",
            ha="left" if k == ks[0] else "right",
            color=colour,
            fontsize=8.5,
        )


def _draw_axes(axes: Axes, ks: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("passages looked at")
    axes.set_ylabel("questions whose answer is in them")

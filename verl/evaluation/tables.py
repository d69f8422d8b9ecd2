"""Tables of figures as Markdown, LaTeX (booktabs) and on the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table as RichTable

from verl.evaluation.metrics import COSTS
from verl.evaluation.statistics import Interval
from verl.evaluation.summary import CURVES, LABELS, Estimate, Group, Point, Summary

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))
ABSENT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of plain text; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    rules: frozenset[int] = frozenset()
    """Rows before which a line is drawn."""


def results_table(summary: Summary) -> Table:
    """Return the figures per source with the averages below."""
    names = summary.names
    groups = list(summary.sources)
    averages = [summary.macro, summary.micro] if len(groups) > 1 else []
    return Table(
        title="Results",
        header=("source", "questions", "failed", *(LABELS.get(name, name) for name in names)),
        rows=tuple(_result_row(group, names) for group in (*groups, *averages)),
        note=_note(summary),
        rules=frozenset({len(groups)} if averages else ()),
    )


def _result_row(group: Group, names: Sequence[str]) -> tuple[str, ...]:
    cells = [
        format_cost(group.estimates.get(name), name)
        if name in COSTS
        else format_estimate(group.estimates.get(name))
        for name in names
    ]
    return (group.name, str(group.num_questions), str(group.num_failed), *cells)


def _note(summary: Summary) -> str:
    note = "Scores in percent with 95 % intervals (bootstrap over questions); costs per answer."
    if summary.failures:
        counts = ", ".join(f"{count} x {name}" for name, count in summary.failures.items())
        note += f" Left out as failed: {counts}."
    for name, count in summary.micro.missing.items():
        label = LABELS.get(name, name)
        note += f" No mean of {label}, which {count} of {summary.micro.num_questions} questions lack."
    return note


def curve_table(summary: Summary, key: str) -> Table:
    """Return the share of right answers by the number of searches or tokens."""
    points = summary.curves[key]
    return Table(
        title=title_curve(summary.measure, key),
        header=(CURVES[key].lower(), "questions", summary.measure),
        rows=tuple(
            (format_bin(p), str(p.estimate.num_questions), format_estimate(p.estimate)) for p in points
        ),
    )


def title_curve(measure: str, key: str) -> str:
    """Return the title of a curve: its measure, and the key of a record that it is shown against."""
    return f"{measure[0].upper()}{measure[1:]} by {CURVES[key].lower()}"


def format_estimate(estimate: Estimate | None) -> str:
    """Return a score in percent with its interval."""
    if estimate is None:
        return ABSENT
    return f"{100 * estimate.value:.1f}{format_interval(estimate.interval)}"


def format_interval(interval: Interval | None, *, sign: str = "") -> str:
    """Return an interval in percent after a space, nothing for None."""
    return "" if interval is None else " [{:{s}.1f}, {:{s}.1f}]".format(*(100 * x for x in interval), s=sign)


def format_cost(estimate: Estimate | None, name: str) -> str:
    """Return a mean of searches, turns, tokens or seconds."""
    if estimate is None:
        return ABSENT
    return f"{estimate.value:.0f}" if name.endswith("tokens") else f"{estimate.value:.2f}"


def format_bin(point: Point) -> str:
    """Return the counts of a bin."""
    return str(point.low) if point.low == point.high else f"{point.low}-{point.high}"


def as_markdown(table: Table) -> str:
    """Return the table in Markdown, under its title."""
    lines = [f"## {table.title}", ""]
    lines.append(_markdown_row(table.header))
    lines.append("|" + "|".join(["---", *["---:"] * (len(table.header) - 1)]) + "|")
    lines += map(_markdown_row, table.rows)
    lines += ["", table.note] if table.note else []
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (re.sub(r"([\\|*_`<])", r"\\\1", " ".join(cell.split())) for cell in cells)
    return f"| {' | '.join(escaped)} |"


def as_latex(table: Table) -> str:
    """Return the table as a LaTeX `table` for the packages booktabs and graphicx."""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(f'{table.title}. {table.note}'.strip())}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        _latex_row(table.header),
        r"\midrule",
    ]
    for number, row in enumerate(table.rows):
        lines += [r"\midrule"] if number in table.rules else []
        lines.append(_latex_row(row))
    lines += [r"\bottomrule", r"\end{tabular}%", "}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(map(_latex, cells))
    # A bracket or star after the end of the row before would be read as its argument.
    return ("{}" if row.startswith(("[", "*")) else "") + row + r" \\"


def _latex(text: str) -> str:
    escaped = _LATEX_SPECIAL.sub(lambda match: _LATEX[match[0]], " ".join(text.split()))
    return "--" if escaped == ABSENT else re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)


def as_rich(table: Table) -> RichTable:
    """Return the table for the terminal."""
    shown = RichTable(
        title=escape(table.title),
        caption=escape(table.note) or None,
        title_justify="left",
        caption_justify="left",
    )
    for number, name in enumerate(table.header):
        shown.add_column(escape(name), justify="left" if number == 0 else "right", overflow="fold")
    for number, row in enumerate(table.rows):
        shown.add_row(*map(escape, row), end_section=number + 1 in table.rules)
    return shown

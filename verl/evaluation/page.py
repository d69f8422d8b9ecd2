"""`write_report(folder)`: the figures of an evaluation as JSON, tables and one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from markupsafe import Markup
from pydantic import TypeAdapter

from serving.files import write_atomically, write_json_atomically
from verl.errors import DataError
from verl.evaluation.charts import draw_curves
from verl.evaluation.evidence import read_evidence
from verl.evaluation.loss_analysis import analysis_json, analyze_losses, ceiling_table, loss_table
from verl.evaluation.protocol_check import find_record, published_table, with_protocol
from verl.evaluation.records import (
    LATEX_FILE,
    MARKDOWN_FILE,
    SETTINGS_FILE,
    SUMMARY_FILE,
    TRAJECTORIES_FILE,
    ResultRecord,
)
from verl.evaluation.summary import CURVES, LABELS, Summary, summarize, summary_json
from verl.evaluation.tables import (
    Table,
    as_latex,
    as_markdown,
    curve_table,
    format_cost,
    format_interval,
    results_table,
)
from verl.evaluation.verdicts import JudgeRecord, read_judge, read_judged_results
from verl.run.records import TrajectoryRecord, parse_record
from verl.run.report.examples import evenly_spaced, shown_bytes
from verl.run.report.report import REPORT_FILE, TEMPLATES, Tile, make_environment
from verl.types import find_rightness
from verl.utils.files import parse_json

_TEMPLATES = Path(__file__).parent / "templates"
_EXAMPLES = 16
"""Shown at most, of each verdict."""
_EXAMPLE_BYTES = 1_000_000
"""About the most HTML of all examples, so that the page stays below 2 MB."""
_VERDICTS = ("right", "wrong", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Some trajectories of an evaluation."""

    shown: list[TrajectoryRecord]
    counts: Mapping[str, int]
    """Of all answers, by verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Tables of the page after those of the results."""

    anchor: str
    title: str
    tables: Sequence[Table]


def write_report(folder: Path) -> Path:
    """Write `summary.json`, `table.md`, `table.tex` and `report.html` from the results of a folder.

    Returns the path of the page. Raises DataError for a folder without results or with damaged ones.
    """
    results = read_judged_results(folder)
    summary = summarize(results)
    settings = read_settings(folder)
    protocol = find_record(settings)
    tables = [results_table(summary), *(curve_table(summary, key) for key in CURVES)]
    tables = [with_protocol(table, protocol) for table in tables]
    figures = summary_json(summary)
    sections = []
    if protocol is not None:
        beside = published_table(summary, protocol)
        sections.append(Section(anchor="published", title="Beside published numbers", tables=[beside]))
    if evidence := read_evidence(folder, results):
        losses = analyze_losses(results, evidence)
        figures["losses"] = analysis_json(losses)
        made = [with_protocol(table, protocol) for table in (loss_table(losses), ceiling_table(losses))]
        sections.append(Section(anchor="losses", title="Wrong answers", tables=made))
    all_tables = [*tables, *(table for section in sections for table in section.tables)]
    page = render_page(
        folder.resolve().name,
        summary=summary,
        tables=tables,
        sections=sections,
        examples=pick_examples(folder, results),
        settings=settings,
        judge=read_judge(folder),
    )
    write_json_atomically(folder / SUMMARY_FILE, figures)
    write_atomically(folder / MARKDOWN_FILE, "\n".join(map(as_markdown, all_tables)))
    write_atomically(folder / LATEX_FILE, "\n".join(map(as_latex, all_tables)))
    write_atomically(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def read_settings(folder: Path) -> dict[str, object]:
    """Return the settings of an evaluation. Raises DataError if they are missing or damaged."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise DataError(f"{path} is not there; expected the folder of an evaluation")
    return parse_json(
        path.read_bytes(), shape=TypeAdapter(dict[str, object]), where=str(path), fix="restore the file"
    )


def render_page(
    title: str,
    *,
    summary: Summary,
    tables: Sequence[Table],
    sections: Sequence[Section],
    examples: Examples,
    settings: Mapping[str, object],
    judge: JudgeRecord | None,
) -> str:
    """Return the page as HTML; text from outside is escaped."""
    curves = {key: {summary.measure: points} for key, points in summary.curves.items()}
    return render_template(
        "evaluation.html",
        title=title,
        tiles=headline(summary),
        tables=tables,
        sections=sections,
        charts=draw_curves(curves, measure=summary.measure),
        summary=summary,
        examples=examples,
        facts=[*list_facts(settings), *list_judge_facts(judge)],
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
    )


def render_template(name: str, **values: object) -> str:
    """Return a template of this package as HTML, in the style of the reports of runs."""
    environment = make_environment(credit_full=0.0, gain_full=0.0, folders=[_TEMPLATES])
    return environment.get_template(name).render(
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        **values,
    )


def headline(summary: Summary) -> list[Tile]:
    """Return the most important numbers; those that were not measured are left out."""
    average = summary.macro if len(summary.sources) > 1 else summary.micro
    what = f"macro average of {len(summary.sources)} sources" if len(summary.sources) > 1 else "all questions"
    tiles = []
    for name in ("math", "em", "f1", "judge", "majority"):
        if found := average.estimates.get(name):
            interval = format_interval(found.interval)
            note = f"{what}{f', 95 %{interval}' if interval else ''}"
            label = LABELS[name][0].upper() + LABELS[name][1:]
            tiles.append(Tile(label=label, before=f"{found.value:.1%}", after=None, note=note))
    for name in ("searches", "output_tokens", "seconds"):
        if found := summary.micro.estimates.get(name):
            value = format_cost(found, name)
            tiles.append(
                Tile(label=f"{LABELS[name]} per answer".capitalize(), before=value, after=None, note="mean")
            )
    failed = f"{summary.micro.num_failed} failed"
    tiles.append(Tile(label="Questions", before=str(summary.micro.num_questions), after=None, note=failed))
    return tiles


def list_facts(settings: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the settings that a reader looks for first, those that are there."""
    keys = {
        "Model": "config.actor_rollout_ref.model.path",
        "Questions": "config.data.val_files",
        "Reference": "config.evaluation.reference",
        "Format": "config.agent.format",
        "Searches per question": "config.max_turns",
        "Passages per search": "config.retriever.topk",
        "Answers per question": "config.evaluation.n",
        "Temperature": "config.evaluation.temperature",
        "Seed": "config.evaluation.seed",
        "Code": "git.sha",
    }
    facts = []
    for label, key in keys.items():
        value: object = settings
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value not in (None, "none"):
            facts.append((label, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return facts


def list_judge_facts(judge: JudgeRecord | None) -> list[tuple[str, str]]:
    """Return which judge gave the verdicts, nothing if none was asked."""
    if judge is None:
        return []
    counts = f"{judge['calls']} calls, {judge['tokens']} tokens, {judge['not_judged']} answers not judged"
    return [("Judge", f"{judge['model']} (settings {judge['sha256'][:12]}): {counts}")]


def pick_examples(folder: Path, results: Sequence[ResultRecord]) -> Examples:
    """Return evenly spaced answers of each verdict with their trajectories, the failed ones first.

    Raises DataError if trajectories and results do not belong to each other.
    """
    lines: dict[str, list[int]] = {verdict: [] for verdict in _VERDICTS}
    for line, result in enumerate(results):
        lines[_verdict(result)].append(line)
    chosen = {verdict: evenly_spaced(found, _EXAMPLES) for verdict, found in lines.items()}
    trajectories = _read_lines(folder / TRAJECTORIES_FILE, results, set(chain(*chosen.values())))
    # One of each verdict in turn until the page is full, then sorted by verdict.
    kept: dict[str, list[TrajectoryRecord]] = {verdict: [] for verdict in _VERDICTS}
    size = 0
    for of_turn in zip_longest(*chosen.values()):
        for verdict, number in zip(chosen, of_turn, strict=True):
            if number is None:
                continue
            size += shown_bytes(trajectories[number])
            if size <= _EXAMPLE_BYTES:
                kept[verdict].append(trajectories[number])
    return Examples(
        shown=[record for verdict in ("failed", "wrong", "right") for record in kept[verdict]],
        counts={verdict: len(found) for verdict, found in lines.items()},
    )


def _verdict(result: ResultRecord) -> str:
    if result["failure"] is not None:
        return "failed"
    return "right" if (find_rightness(result["metrics"]) or 0.0) >= 1.0 else "wrong"


def _read_lines(
    path: Path, results: Sequence[ResultRecord], wanted: Iterable[int]
) -> dict[int, TrajectoryRecord]:
    """Return the trajectories of these lines, each of the result in the same line."""
    wanted = set(wanted)
    found = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if number in wanted:
                    found[number] = parse_record(line, where=f"{path}:{number + 1}")
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there; expected the folder of an evaluation") from error
    for number in wanted:
        record, result = found.get(number), results[number]
        if record is None or (record["uid"], record["sample"]) != (result["uid"], result["sample"]):
            raise DataError(
                f"{path}:{number + 1} is not the trajectory of {result['uid']} (sample {result['sample']}); "
                "was the file edited? The same evaluation again brings both files into one order"
            )
    return found

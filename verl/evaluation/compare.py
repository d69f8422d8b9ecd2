"""Compare evaluations: `python -m verl.evaluation.compare RUN RUN ... [--metric em] [--output FOLDER]`.

The runs are folders of `verl.trainer.main_eval` that answered the same questions; the others are compared
with the first, with `--base`, or each with each. Tables go to the terminal, and with --output as Markdown,
LaTeX, JSON and a page to a folder. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from string import ascii_lowercase

from rich.console import Console

from serving.files import write_atomically, write_json_atomically
from serving.web.settings import expand_home
from verl.errors import DataError
from verl.evaluation.charts import draw_curves
from verl.evaluation.metrics import score_questions
from verl.evaluation.page import render_template
from verl.evaluation.paired import (
    MACRO,
    Comparison,
    Runs,
    compare_runs,
    comparison_json,
    list_pairs,
    pair_runs,
    shared_curves,
)
from verl.evaluation.protocol_check import find_record
from verl.evaluation.records import SETTINGS_FILE, ResultRecord
from verl.evaluation.settings import list_differences, read_manifest
from verl.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES
from verl.evaluation.summary import CURVES, LABELS, Estimate, Point, estimate, name_measure
from verl.evaluation.tables import (
    ABSENT,
    Table,
    as_latex,
    as_markdown,
    as_rich,
    format_bin,
    format_cost,
    format_estimate,
    format_interval,
    title_curve,
)
from verl.evaluation.verdicts import read_judge, read_judged_results
from verl.utils.entry import error_line

_COSTS = ("searches", "output_tokens", "seconds")
_FILE_WIDTH = 160
"""Columns of the tables where the output is not a terminal."""
Curves = Mapping[str, Mapping[str, Sequence[Point]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the runs, or exit with one line that says why that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of an evaluation")
    parser.add_argument(
        "--metric",
        action="append",
        help="em (default), f1, sub_em, set_f1, judge, majority, pass@K; can be given several times",
    )
    parser.add_argument(
        "--intersect",
        action="store_true",
        help="compare the questions that all runs have, and count the others",
    )
    parser.add_argument("--base", metavar="NAME", help="the run that others are compared with (the first)")
    parser.add_argument("--pairs", choices=["all"], help="compare every run with every other")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write tables and a page there")
    options = parser.parse_args(expand_home(arguments))
    if len(options.runs) < 2:
        parser.error("give at least two runs: the others are compared with the first")
    if options.pairs == "all" and options.base is not None:
        parser.error("--pairs all compares every run with every other: leave out --base")
    with error_line():
        found = compare_folders(
            options.runs,
            metrics=list(dict.fromkeys(options.metric or ["em"])),
            intersect=options.intersect,
            base=options.base,
            every_pair=options.pairs == "all",
            output=options.output,
        )
        print(json.dumps(found, allow_nan=False), flush=True)  # noqa: T201 (for the program that started this one)


def compare_folders(
    folders: Sequence[Path],
    *,
    metrics: Sequence[str],
    intersect: bool,
    output: Path | None,
    base: str | None = None,
    every_pair: bool = False,
) -> dict[str, object]:
    """Print the comparison of evaluation folders, write it to `output`, and return it as JSON.

    Runs are compared with `base`, by default the first, or each with each. Raises DataError for folders that
    are damaged or do not have the same questions.
    """
    paths = {name: str(folder) for name, folder in name_runs(folders).items()}
    pairs = list_pairs([*paths], base=base, every=every_pair)
    if "judge" in metrics:
        check_judges(paths)
    every = {name: read_judged_results(Path(path)) for name, path in paths.items()}
    runs, left_out = pair_runs(every, intersect=intersect)
    asked = set.intersection(*({r["data_source"] for r in results} for results in every.values()))
    comparisons = [compare_runs(runs, metric=metric, pairs=pairs, asked=asked) for metric in metrics]
    settings = list_settings_notes(paths, base=pairs[0][1])
    curves = shared_curves(runs)
    measure = name_measure(chain(*runs.values()))
    tables = [
        *(
            table
            for c in comparisons
            for table in (score_table(c, runs, left_out, settings), difference_table(c))
        ),
        *(curve_table(curves[key], key, measure=measure) for key in CURVES),
    ]
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    for table in tables:
        console.print(as_rich(table), "")
    first = next(iter(runs.values()))
    found: dict[str, object] = {
        "format": 1,
        "runs": paths,
        "answers": len(first),
        "questions": len({record["uid"] for record in first}),
        "left_out": left_out,
        "settings": settings,
        "measure": measure,
        "interval": {"confidence": CONFIDENCE, "method": "BCa bootstrap", "resamples": NUM_RESAMPLES},
        "metrics": {c.metric: comparison_json(c) for c in comparisons},
    }
    if output is not None:
        write_comparison(output, found=found, tables=tables, curves=curves)
    return found


def check_judges(paths: Mapping[str, str]) -> None:
    """Raise DataError if the runs were judged by other models or prompts: the verdicts do not compare."""
    judges = {name: judge for name, path in paths.items() if (judge := read_judge(Path(path))) is not None}
    if len({(judge["model"], judge["settings"].get("prompt")) for judge in judges.values()}) > 1:
        shown = (f"{name} by {j['model']} (settings {j['sha256'][:12]})" for name, j in judges.items())
        raise DataError(
            f"--metric judge: the runs were judged by other models or prompts: {', '.join(shown)}. Fix: "
            "judge them again with the same --settings (python -m verl.evaluation.judge)"
        )


def list_settings_notes(paths: Mapping[str, str], *, base: str) -> list[str]:
    """Return a sentence on each run whose settings differ from those of `base` or deviate from a protocol.

    Raises DataError for damaged settings.
    """
    found = {
        name: read_manifest(path, fix="restore the file")
        for name, folder in paths.items()
        if (path := Path(folder) / SETTINGS_FILE).is_file()
    }
    unknown = [name for name in paths if name not in found]
    notes = [f"{name} has no {SETTINGS_FILE}: its settings are unknown." for name in unknown]
    for name in paths:
        if name != base and base in found and name in found:
            words = (f"of {base} is", f"of {name}")
            differences = list_differences(found[base], found[name], words=words)
            notes += [f"Settings differ: {'; '.join(differences)}."] if differences else []
    for name, manifest in found.items():
        if (record := find_record(manifest)) is not None and record["deviations"]:
            notes.append(
                f"{name} DEVIATES from protocol {record['name']}: {'; '.join(record['deviations'])}."
            )
    return notes


def name_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folders by their names, with as many of the folders above as tell them apart.

    Raises DataError for a folder that is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise DataError(f"a run is given twice: {', '.join(map(str, folders))}")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = [os.sep.join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))


def write_comparison(
    folder: Path, *, found: Mapping[str, object], tables: Sequence[Table], curves: Curves
) -> None:
    """Write the comparison as JSON, Markdown, LaTeX and a self-contained page."""
    measure = str(found["measure"])
    charts = draw_curves(curves, measure=measure)
    write_json_atomically(folder / "comparison.json", found)
    write_atomically(folder / "comparison.md", "\n".join(map(as_markdown, tables)))
    write_atomically(folder / "comparison.tex", "\n".join(map(as_latex, tables)))
    page = render_template("comparison.html", runs=found["runs"], tables=tables, charts=charts)
    write_atomically(folder / "comparison.html", page)


def score_table(
    comparison: Comparison, runs: Runs, left_out: Mapping[str, int], settings: Sequence[str] = ()
) -> Table:
    """Return one row per run with its scores on every set and its costs; what differs is marked.

    With one base a star marks a difference, otherwise letters name the runs that a score is higher than.
    `settings` are sentences for the note on what else differs.
    """
    marks, meaning = mark_scores(comparison, [*runs])
    label = LABELS.get(comparison.metric, comparison.metric)
    rows = []
    for name, results in runs.items():
        costs = summarize_costs(results)
        scores = [
            format_estimate(of_runs[name]) + marks.get((name, set_name), "")
            for set_name, of_runs in comparison.scores.items()
        ]
        rows.append((name, *scores, *costs))
    num_questions = len({record["uid"] for record in next(iter(runs.values()))})
    note = (
        f"{num_questions} questions, scores in percent with 95 % intervals (bootstrap over questions). "
        f"{meaning}, p < 0.05 after Holm's adjustment."
    )
    if left_out:
        note += f" Answers left out: {', '.join(f'{count} {why}' for why, count in left_out.items())}."
    if comparison.empty_sources:
        empty = ", ".join(comparison.empty_sources)
        note += f" There is no macro average: all questions of {empty} were left out."
    note = " ".join([note, *settings])
    return Table(
        title=label,
        header=("run", *comparison.scores, *(LABELS[name] for name in _COSTS)),
        rows=tuple(rows),
        note=note,
    )


def mark_scores(comparison: Comparison, names: Sequence[str]) -> tuple[dict[tuple[str, str], str], str]:
    """Return the marks behind scores, by run and set, and what they mean."""
    found = [d for d in comparison.differences if d.is_significant]
    base = find_base(comparison)
    if base is not None:
        return {(d.run, d.set_name): "*" for d in found}, f"* differs from {base}"
    letters = {name: _number_letters(number) for number, name in enumerate(names)}
    lower: dict[tuple[str, str], set[str]] = {}
    for d in found:
        higher, other = (d.run, d.base) if d.estimate.value > 0 else (d.base, d.run)
        lower.setdefault((higher, d.set_name), set()).add(letters[other])
    marks = {key: f" >{','.join(sorted(of_one))}" for key, of_one in lower.items()}
    runs = ", ".join(f"{letter} is {name}" for name, letter in letters.items())
    return marks, f">a: higher than run a ({runs})"


def find_base(comparison: Comparison) -> str | None:
    """Return the run that all others are compared with; None if each is compared with each."""
    bases = {difference.base for difference in comparison.differences}
    runs = {difference.run for difference in comparison.differences}
    return bases.pop() if len(bases) == 1 and not bases & runs else None


def _number_letters(number: int) -> str:
    return ascii_lowercase[number] if number < len(ascii_lowercase) else str(number + 1)


def summarize_costs(results: Sequence[ResultRecord]) -> list[str]:
    """Return mean searches, sampled tokens and seconds per answer."""
    scores = score_questions(results)
    costs = {name: estimate([[s.values[name] for s in scores]], with_interval=False) for name in _COSTS}
    return [format_cost(costs[name], name) for name in _COSTS]


def difference_table(comparison: Comparison) -> Table:
    """Return one row per set and pair: the difference with its interval and p values."""
    base = find_base(comparison)
    rows = [
        (
            d.set_name,
            d.run,
            *(() if base is not None else (d.base,)),
            str(d.estimate.num_questions),
            f"{100 * d.estimate.value:+.1f}{format_interval(d.estimate.interval, sign='+')}",
            _format_p(d.p_value),
            _format_p(d.adjusted) + ("*" if d.is_significant else ""),
            d.test,
        )
        for d in comparison.differences
    ]
    num_rows_of_sets = sum(d.set_name != MACRO for d in comparison.differences)
    label = LABELS.get(comparison.metric, comparison.metric)
    return Table(
        title=f"{label}: differences {'of all pairs' if base is None else f'to {base}'}",
        header=(
            "set",
            "run",
            *(() if base is not None else ("minus",)),
            "questions",
            "difference",
            "p",
            "p (Holm)",
            "test",
        ),
        rows=tuple(rows),
        note="Paired over questions: exact McNemar test where an answer is right or wrong, otherwise a "
        f"paired sign-flip test. Holm's adjustment is over the {len(rows)} tests of this table.",
        rules=frozenset({num_rows_of_sets} if 0 < num_rows_of_sets < len(rows) else ()),
    )


def _format_p(p_value: float | None) -> str:
    if p_value is None:
        return ABSENT
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def curve_table(series: Mapping[str, Sequence[Point]], key: str, *, measure: str) -> Table:
    """Return the right answers of every run by the number of searches or tokens of its answers."""
    bins = {(p.low, p.high): format_bin(p) for points in series.values() for p in points}
    found = {name: {(p.low, p.high): p.estimate for p in points} for name, points in series.items()}
    rows = [
        (label, *(_format_point(of_run.get(ends)) for of_run in found.values()))
        for ends, label in sorted(bins.items())
    ]
    return Table(
        title=title_curve(measure, key),
        header=(CURVES[key].lower(), *series),
        rows=tuple(rows),
        note="Behind each score the number of questions.",
    )


def _format_point(found: Estimate | None) -> str:
    return ABSENT if found is None else f"{format_estimate(found)} ({found.num_questions})"


if __name__ == "__main__":
    main()

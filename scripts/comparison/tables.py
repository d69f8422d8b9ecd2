"""The tables of a comparison: scores with verdicts, costs, tuning, values of a setting, runs, board."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence

from comparison.campaign import Campaign, Trial
from comparison.pace import STANDARD_S
from comparison.plan import Stage, Tuning, write_value
from comparison.readings import (
    COLLAPSE_WINDOW,
    LEVELS,
    NO_SEARCHES,
    WINDOW,
    Cost,
    Difference,
    Reading,
    Runs,
    compare,
    compare_pairs,
    cost_to,
    final_em,
    has_collapsed,
    has_stopped_searching,
    last_mean,
    mean_over_seeds,
)
from comparison.results import Result
from comparison.runs import RunSpec
from verl.evaluation.statistics import Interval
from verl.evaluation.tables import ABSENT, Table

BOARD_LEVEL = LEVELS[-1]
_SECONDS = (
    "of trainer, engines and services together, without evaluations and start, on a core that takes "
    f"{STANDARD_S:g} s for the pass in scripts/comparison/pace.py. The pass is timed before and after every "
    "run, as runs may be of different machines."
)
_CERTAINTY = (
    "Verdicts at p < 0.05 by Holm over the methods of a column, from a t test over seeds and questions: "
    "questions are paired, the seeds of two methods are independent, degrees of freedom by Satterthwaite. "
    "Intervals have at least 95 %: the level at which Holm's method stops, so that they are without 0 "
    "exactly where the verdict is better or worse. A bootstrap over so few seeds does not hold its level: "
    "where they differ much it finds a difference whenever all agree in sign (see docs/evaluation.md)."
)


def score_table(runs: Runs, *, base: str | None, stage: Stage) -> Table:
    """Return one row per method: EM at the end, differences to the base by both readings, collapses."""
    differences = (
        {(d.method, d.reading): d for d in compare(runs, base=base)}
        if base is not None and base in runs
        else {}
    )
    rows = []
    for name, results in runs.items():
        cells = [
            name,
            f"{len(results)}/{stage.seeds}",
            _percent(mean_over_seeds(results, final_em)),
            *(
                cell
                for reading in Reading
                for cell in _difference_cells(differences.get((name, reading)), is_base=name == base)
            ),
            _number(mean_over_seeds(results, lambda result: last_mean(result.searches))),
            str(sum(map(has_collapsed, results))),
            str(sum(map(has_stopped_searching, results))),
        ]
        rows.append(tuple(cells))
    return Table(
        title="Exact match, and differences to " + (base or "nothing"),
        header=(
            "method",
            "seeds",
            "EM",
            "difference",
            "verdict",
            "at equal searches",
            "verdict",
            "searches",
            "collapsed",
            "no searches",
        ),
        rows=tuple(rows),
        note="EM in percent, greedy, on the held-out questions after the last step, with the standard "
        f"deviation over seeds. Differences in points. {_CERTAINTY} At equal searches: when both had made as "
        "many as the one that searches less made in all, between two evaluations in proportion. "
        f"Searches: per episode, last {COLLAPSE_WINDOW} steps. Collapsed: runs "
        f"whose sampled EM (mean of {COLLAPSE_WINDOW} steps) ended below half of its best; no searches: runs "
        f"that ended with fewer than {NO_SEARCHES:g} per episode.",
    )


def control_table(runs: Runs, pairs: Sequence[tuple[str, str]]) -> Table:
    """Return one row per method that has a control: the differences to it by both readings."""
    found = {(d.method, d.reading): d for d in compare_pairs(runs, pairs)}
    rows = [
        (
            name,
            control,
            *(cell for reading in Reading for cell in _difference_cells(found[name, reading], is_base=False)),
        )
        for name, control in pairs
    ]
    return Table(
        title="Differences to the same outcome reward without a gain",
        header=("method", "control", "difference", "verdict", "at equal searches", "verdict"),
        rows=tuple(rows),
        note="As above. A control is rewarded for F1 alone, with the settings that the plan gives it: what a "
        "method wins over it is due to the gain.",
    )


def cost_table(runs: Runs) -> Table:
    """Return one row per method: steps, tokens and processor seconds until EM 0.5 and 0.7."""
    rows = [
        (name, *(cell for level in LEVELS for cell in _cost_cells(results, level)))
        for name, results in runs.items()
    ]
    header = ["method"]
    for level in LEVELS:
        header += [f"EM {level:g}", "steps", "tokens", "processor s"]
    return Table(
        title="What it takes to reach a level",
        header=tuple(header),
        rows=tuple(rows),
        note="A level is reached at the first step at which the EM of sampled episodes on training "
        f"questions, as the mean of {WINDOW} steps, is at least that. Seeds that reached it, and medians "
        "over all seeds, in which one that did not reach it counts as infinite. Tokens: prompts, "
        f"observations and sampled ones of all episodes. Processor seconds: {_SECONDS}",
    )


def tuning_table(
    trials: Mapping[str, Sequence[Trial]], tuning: Tuning, *, repeats: Runs, longest: int
) -> Table:
    """Return one row per trial and one column per method: EM of the last steps; the best is marked.

    A last row has the same of `repeats`, runs of other seeds. `longest` is the number of steps of the runs
    that use what was found.
    """
    names = list(trials)
    rates = [trial.run.tuned.lr for trial in trials[names[0]]]
    edges = {min(rates), max(rates)} if len(set(rates)) > 1 else set()
    rows = []
    for k, first in enumerate(trials[names[0]]):
        cells = [str(first.run.tuned)]
        for name in names:
            em, every = trials[name][k].em, [trial.em for trial in trials[name]]
            known = [value for value in every if value is not None]
            is_best = em is not None and len(known) == len(every) and every.index(max(known)) == k
            mark = "" if not is_best else " * edge" if first.run.tuned.lr in edges else " *"
            cells.append(ABSENT if em is None else f"{100 * em:.1f}{mark}")
        rows.append(tuple(cells))
    note = ""
    if any(repeats.values()):
        rows.append(("the best, other seeds", *(_repeats_cell(repeats[name], tuning) for name in names)))
        note = (
            " Other seeds: the same steps of the runs that use it, mean and standard deviation (number of "
            "seeds). The best of several trials tends to be above the mean of its repeats."
        )
    return Table(
        title="Search for learning rate, group size and KL",
        header=("setting", *names),
        rows=tuple(rows),
        note=f"EM in percent of sampled episodes on training questions, mean of the last {tuning.window} of "
        f"{tuning.steps} steps, one seed that no other run has. * the best, which all other runs of the "
        f"method use; they have up to {longest} steps, after which another one may be best. "
        "Edge: the best learning rate is the least or the largest tried, so that another may be better."
        + note,
    )


def variation_table(runs: Runs, *, setting: str) -> Table:
    """Return one row per value of the setting."""
    rows = [
        (
            name.partition("=")[2] or name,
            str(len(results)),
            _percent(mean_over_seeds(results, final_em)),
            _number(mean_over_seeds(results, lambda result: last_mean(result.searches))),
            _number(mean_over_seeds(results, lambda result: last_mean(result.gain))),
        )
        for name, results in runs.items()
    ]
    return Table(
        title=f"Different values of {setting}",
        header=(setting, "seeds", "EM", "searches", "gain"),
        rows=tuple(rows),
        note=f"EM as above; searches and gain: mean of the last {COLLAPSE_WINDOW} steps; standard "
        "deviations over seeds.",
    )


def run_table(campaign: Campaign, runs: Sequence[RunSpec]) -> Table:
    """Return one row per run that is done, with the code that made it."""
    rows = []
    for run in runs:
        if (result := campaign.results.get(run.key)) is not None:
            git = result.manifest.get("git") or {}
            sha = f"{str(git.get('sha', ABSENT))[:10]}{' changed' if git.get('dirty') else ''}"
            started = str(result.manifest.get("started") or ABSENT)
            rows.append((run.key, run.label, sha, started, f"{result.wall_s:.0f}"))
    return Table(
        title="Runs",
        header=("key", "run", "code", "started", "seconds"),
        rows=tuple(rows),
        note="docs/comparison/runs/KEY.json has the manifest of a run: settings, versions, hashes, machine.",
    )


def board_table(
    campaign: Campaign, runs: Mapping[str, Sequence[RunSpec]], *, stage_name: str, plan: str
) -> Table:
    """Return one line per method and recipe, the fastest first, with the command that repeats a seed."""
    entries = []
    for name, specs in runs.items():
        done = [spec for spec in specs if spec.key in campaign.results]
        if not done:
            continue
        results = [campaign.results[spec.key] for spec in done]
        costs = [cost_to(result, BOARD_LEVEL) for result in results]
        seconds = [math.inf if cost is None else cost.processor_s or math.inf for cost in costs]
        # The seed at the median stands for the entry, or the slowest one that reached the level.
        order = sorted(zip(seconds, done, strict=True), key=lambda pair: pair[0])
        num_reached = len(costs) - costs.count(None)
        shown = order[max(0, min((len(order) - 1) // 2, num_reached - 1))][1]
        arguments = f"--plan {shlex.quote(plan)} --stage {stage_name} --verify {shown.key}"
        recipe = ", ".join(
            [str(shown.tuned), *(f"{k}={write_value(v)}" for k, v in shown.method.settings.items())]
        )
        row = (
            f"{name}: {recipe}",
            *_cost_cells(results, BOARD_LEVEL),
            f"make compare COMPARE_ARGS='{arguments}'",
        )
        entries.append((statistics.median(seconds), costs.count(None), row))
    entries.sort(key=lambda entry: entry[:2])
    return Table(
        title=f"Board: EM {BOARD_LEVEL:g} on two cores",
        header=("method and recipe", "seeds", "steps", "tokens", "processor s", "verify"),
        rows=tuple(row for *_, row in entries),
        note=f"Cost until the EM of sampled episodes, as the mean of {WINDOW} steps, is {BOARD_LEVEL:g}; "
        f"medians over all seeds, in which one that did not reach it counts as infinite. Seconds: {_SECONDS} "
        "To add a line: add a method to a plan, do its runs (make compare), and send the plan with the files "
        "in runs/.",
    )


def verify_table(recorded: Result | None, again: Result) -> Table:
    """Return what a run took when it was recorded and what it took now."""
    rows = []
    for what, result in (("recorded", recorded), ("now", again)):
        em = None if result is None else final_em(result)
        results = [] if result is None else [result]
        cells = [cell for level in LEVELS for cell in _cost_cells(results, level)[1:]]
        wall = ABSENT if result is None else f"{result.wall_s:.0f}"
        rows.append((what, ABSENT if em is None else f"{100 * em:.1f}", wall, *cells))
    header = ["", "EM at the end", "seconds of the run"]
    for level in LEVELS:
        header += [f"steps to EM {level:g}", "tokens", "processor s"]
    return Table(title="The same run twice", header=tuple(header), rows=tuple(rows))


_COSTS: tuple[Callable[[Cost], float | None], ...] = (
    lambda cost: cost.step,
    lambda cost: cost.tokens,
    lambda cost: cost.processor_s,
)


def _difference_cells(difference: Difference | None, *, is_base: bool) -> tuple[str, str]:
    if is_base or difference is None:
        return ABSENT, "base" if is_base else ABSENT
    p = difference.adjusted
    shown = "" if p is None else f" (p {'<0.001' if p < 0.001 else f'{p:.3f}'})"
    return write_points(difference.value, difference.interval), f"{difference.verdict}{shown}"


def write_points(value: float | None, interval: Interval | None) -> str:
    """Return a difference of EM in points, with its interval if there is one."""
    if value is None:
        return ABSENT
    shown = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return f"{100 * value:+.1f}{shown}"


def _cost_cells(results: Sequence[Result], level: float) -> tuple[str, ...]:
    """Return how many runs reached the level, and the medians of steps, tokens and processor seconds."""
    costs = [cost_to(result, level) for result in results]
    cells = [f"{len(costs) - costs.count(None)}/{len(costs)}"]
    for measure in _COSTS:
        values = [math.inf if cost is None else measure(cost) for cost in costs]
        known = [value for value in values if value is not None]
        median = statistics.median(known) if known and len(known) == len(values) else None
        if median is None or (math.isinf(median) and measure is not _COSTS[0]):
            cells.append(ABSENT)
        else:
            cells.append(f"> {max(r.steps for r in results)}" if math.isinf(median) else f"{median:,.0f}")
    return tuple(cells)


def _repeats_cell(results: Sequence[Result], tuning: Tuning) -> str:
    """Return what trials with the seeds of some runs would have given."""
    if not results:
        return ABSENT
    found = mean_over_seeds(results, lambda result: last_mean(result.em[: tuning.steps], tuning.window))
    return f"{_percent(found)} ({len(results)})"


def _percent(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ABSENT
    mean, deviation = found
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _number(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ABSENT
    mean, deviation = found
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")

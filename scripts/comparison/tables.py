"""The tables of a comparison: scores with verdicts, costs, tuning, values of a setting, runs, board."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence

from comparison.campaign import Campaign, Trial
from comparison.plan import Stage, write_value
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
    cost_to,
    final_em,
    has_collapsed,
    has_stopped_searching,
    last_mean,
    mean_over_seeds,
)
from comparison.results import Result
from comparison.runs import RunSpec
from verl.evaluation.tables import ABSENT, Table

BOARD_LEVEL = LEVELS[-1]


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
        "deviation over seeds. Differences in points with 95 % intervals, and verdicts at p < 0.05: paired "
        "bootstrap over questions and seeds, Holm's adjustment over the methods of a column. At equal "
        "searches: when both had made as many as the one that searches less made in all, between two "
        f"evaluations in proportion. Searches: per episode, last {COLLAPSE_WINDOW} steps. Collapsed: runs "
        f"whose sampled EM (mean of {COLLAPSE_WINDOW} steps) ended below half of its best; no searches: runs "
        f"that ended with fewer than {NO_SEARCHES:g} per episode.",
    )


def cost_table(runs: Runs) -> Table:
    """Return one row per method: steps, tokens and seconds until EM 0.5 and 0.7."""
    rows = []
    for name, results in runs.items():
        cells = [name]
        for level in LEVELS:
            costs = [cost_to(result, level) for result in results]
            cells += [_reached(costs), *(_median(costs, measure) for measure in _COSTS)]
        rows.append(tuple(cells))
    header = ["method"]
    for level in LEVELS:
        header += [f"EM {level:g}", "steps", "tokens", "processor s"]
    return Table(
        title="What it takes to reach a level",
        header=tuple(header),
        rows=tuple(rows),
        note="A level is reached at the first step at which the EM of sampled episodes on training "
        f"questions, as the mean of {WINDOW} steps, is at least that. Seeds that reached it, and the "
        "medians of these. Tokens: prompts, observations and sampled ones of all episodes. Processor "
        "seconds: of trainer, engines and services together, without evaluations and start.",
    )


def tuning_table(trials: Mapping[str, Sequence[Trial]], *, steps: int, window: int) -> Table:
    """Return one row per trial and one column per method: EM of the last steps; the best is marked."""
    names = list(trials)
    rows = []
    for k, first in enumerate(trials[names[0]]):
        cells = [str(first.run.tuned)]
        for name in names:
            em, every = trials[name][k].em, [trial.em for trial in trials[name]]
            known = [value for value in every if value is not None]
            is_best = em is not None and len(known) == len(every) and every.index(max(known)) == k
            cells.append(ABSENT if em is None else f"{100 * em:.1f}{' *' if is_best else ''}")
        rows.append(tuple(cells))
    return Table(
        title="Search for learning rate, group size and KL",
        header=("setting", *names),
        rows=tuple(rows),
        note=f"EM in percent of sampled episodes on training questions, mean of the last {window} of "
        f"{steps} steps, one seed that no other run has. * the best, which all other runs of the method "
        "use; every method has the same number of trials.",
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
        note="The manifest of each run is in runs/KEY.json: settings, versions, hashes of data, machine.",
    )


def board_table(
    campaign: Campaign, runs: Mapping[str, Sequence[RunSpec]], *, stage_name: str, plan: str
) -> Table:
    """Return one line per method and recipe, the fastest first, with the command that repeats a seed."""
    entries = []
    for name, specs in runs.items():
        done = [(spec, campaign.results[spec.key]) for spec in specs if spec.key in campaign.results]
        costs = [cost_to(result, BOARD_LEVEL) for _, result in done]
        known = [cost.processor_s for cost in costs if cost is not None and cost.processor_s is not None]
        if not known:
            continue
        median = statistics.median(known)
        # The seed nearest to the median stands for the entry.
        nearest = min(
            (
                (spec, cost.processor_s)
                for (spec, _), cost in zip(done, costs, strict=True)
                if cost is not None and cost.processor_s is not None
            ),
            key=lambda pair: abs(pair[1] - median),
        )[0]
        arguments = f"--plan {shlex.quote(plan)} --stage {stage_name} --verify {nearest.key}"
        recipe = ", ".join(
            [str(nearest.tuned), *(f"{k}={write_value(v)}" for k, v in nearest.method.settings.items())]
        )
        row = (
            f"{name}: {recipe}",
            _reached(costs),
            *(_median(costs, measure) for measure in _COSTS),
            f"make compare COMPARE_ARGS='{arguments}'",
        )
        entries.append((costs.count(None), median, row))
    entries.sort(key=lambda entry: entry[:2])
    return Table(
        title=f"Board: EM {BOARD_LEVEL:g} on two cores",
        header=("method and recipe", "seeds", "steps", "tokens", "processor s", "verify"),
        rows=tuple(row for *_, row in entries),
        note=f"Cost until the EM of sampled episodes, as the mean of {WINDOW} steps, is {BOARD_LEVEL:g}; "
        "medians of the seeds that reached it. Methods of which more seeds reached it come first. Processor "
        "seconds are those of all processes of a run, so that what else the cores do counts little. To add "
        "a line: add a method to a plan, do its runs (make compare), and send the plan with the files in "
        "runs/.",
    )


def verify_table(recorded: Result | None, again: Result) -> Table:
    """Return what a run took when it was recorded and what it took now."""
    rows = []
    for what, result in (("recorded", recorded), ("now", again)):
        costs = [None if result is None else cost_to(result, level) for level in LEVELS]
        em = None if result is None else final_em(result)
        cells = [_median([cost], measure) for cost in costs for measure in _COSTS]
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
    if difference.value is None or difference.interval is None:
        return ABSENT, difference.verdict
    low, high = difference.interval
    p = difference.adjusted
    shown = "" if p is None else f" (p {'<0.001' if p < 0.001 else f'{p:.3f}'})"
    return (
        f"{100 * difference.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
        f"{difference.verdict}{shown}",
    )


def _reached(costs: Sequence[Cost | None]) -> str:
    return f"{len(costs) - costs.count(None)}/{len(costs)}"


def _median(costs: Sequence[Cost | None], measure: Callable[[Cost], float | None]) -> str:
    known = [value for cost in costs if cost is not None and (value := measure(cost)) is not None]
    return f"{statistics.median(known):,.0f}" if known else ABSENT


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

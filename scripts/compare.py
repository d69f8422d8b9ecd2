"""Compare methods: do the runs of a plan one after the other, and say what they show.

`make compare` runs this. A plan (YAML, `scripts/comparison/plans/`) names worlds, methods, the search for
their settings, seeds and ablations. The result of each run is a small file, `docs/comparison/runs/KEY.json`;
a run whose file is there is not done again, one that was interrupted begins again. Several commands with the
same --docs and different --work share the runs that are left. At the end, and with
--report at any time, the report is written: docs/comparison.md, docs/board.md,
docs/comparison/comparison.html and figures; of another plan than the default one to docs/comparison/PLAN/.
The last line of output is one JSON object:

  done, runs      runs that are done, of all that the plan names
  left_s          seconds that the others will take here, by those that are done; null: not known yet
  failed          runs that ended with an error in this call, by name
  not_separated   methods that a stage with must_differ has not shown to be worse; null: not all is done
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp

from rich.console import Console
from screen import Screen

from comparison.campaign import TUNING, Campaign, estimate_seconds, make_campaign
from comparison.claims import find_unseparated
from comparison.pace import machine_pace
from comparison.plan import Plan, read_plan
from comparison.report import Places, find_places, show, write_report
from comparison.results import LOCKS, Result, read_results, result_file, write_result
from comparison.runner import Runner
from comparison.runs import ROOT, RunSpec
from comparison.tables import verify_table
from serving.files import lock_file
from serving.web.settings import expand_home
from verl.errors import ConfigError, UserError
from verl.evaluation.tables import as_rich
from verl.trainer.launch import count_gpus
from verl.utils.entry import describe_error, error_line
from verl.utils.shutdown import cancel_by_signals
from verl.utils.supervise import Supervisor, is_service_variable

MAX_FAILURES = 3
"""Runs in a row that may fail: then the machine, not a method, is the cause."""

WAIT_S = 1.0
"""Between two looks at what other comparisons have done."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan", default="default", help="default, separates, easy, or a YAML file (default: default)"
    )
    parser.add_argument("--stage", action="append", metavar="NAME", help="do only this stage; several times")
    parser.add_argument(
        "--hours", type=float, help="begin no run that would end after so many hours; do those that still fit"
    )
    parser.add_argument(
        "--report", action="store_true", help="write the report of what is done, and do nothing"
    )
    parser.add_argument(
        "--verify",
        metavar="KEY",
        help="do a run again in a new folder of --work, record nothing, print what it took beside what is "
        "recorded",
    )
    parser.add_argument("--list", action="store_true", help="print the runs that are left, and do nothing")
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="folder of results and reports (default: docs)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "compare",
        help="folder of run folders (default runs/compare)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep episodes and checkpoints; those of an earlier attempt move to previous-*",
    )
    return parser.parse_args(expand_home(argv))


def choose_stages(plan: Plan, asked: Sequence[str] | None) -> list[str]:
    """Return the stages to do, in the order of the plan. Raises ConfigError for an unknown one."""
    names = [*([TUNING] if plan.tuning is not None else []), *plan.stages]
    if unknown := sorted(set(asked or ()) - set(names)):
        raise ConfigError(f"--stage {unknown[0]}: expected one of {', '.join(names)}")
    return [name for name in names if asked is None or name in asked]


def require_device(plan: Plan, *, num_gpus: int) -> None:
    """Raise ConfigError where runs would use a GPU that the plan does not name: their results would count as
    those of CPUs, with the seconds of processors alone."""
    devices = {(plan.settings | method.settings).get("trainer.device") for method in plan.methods.values()}
    if num_gpus and devices != {"cuda"}:
        raise ConfigError(
            "this machine has a GPU, and results of CPUs and GPUs are kept apart: add `trainer.device: cuda` "
            "to the settings of a copy of the plan (--plan FILE), or install the packages for CPUs "
            "(make venv PLATFORM=cpu)"
        )


def is_there(plan: Plan, stage: str) -> bool:
    """Return whether the world of a stage is there."""
    if stage == TUNING:
        return plan.tuning is not None
    return (plan.worlds[plan.stages[stage].world].source / "corpus.jsonl").is_file()


async def do_runs(
    runner: Runner, screen: Screen, plan: Plan, *, stages: Sequence[str], results: Path, hours: float | None
) -> dict[str, str]:
    """Do what is left of the stages; return what failed, by the name of the run."""
    began, failed, in_a_row, is_waiting = time.monotonic(), dict[str, str](), 0, False
    while in_a_row < MAX_FAILURES:
        campaign = make_campaign(plan, read_results(results))
        left = [run for run in campaign.left(stages) if run.label not in failed]
        if not left:
            break
        fitting = left
        if hours is not None:
            rest_s = 3600 * hours - (time.monotonic() - began)
            fitting = [run for run in left if (estimate(campaign, [run]) or 0.0) <= rest_s]
            if not fitting:
                screen.print(f"no other run ends within the {hours:g} hours", style="yellow")
                break
        with reserve(fitting, results) as run:
            if run is None:
                if not is_waiting:
                    screen.print("other comparisons are doing all that can be done now; waiting for them")
                is_waiting = True
                await asyncio.sleep(WAIT_S)
                continue
            is_waiting = False
            try:
                result = await runner.run(run, title=describe_next(campaign, run, left=left, stages=stages))
            except (UserError, OSError) as error:
                failed[run.label] = describe_error(error)
                in_a_row += 1
                screen.print(f"failed: {run.label}: {failed[run.label]}", style="bold red")
                continue
            if run.has_changed():
                raise ConfigError(
                    f"files of the world {run.world.source} have changed since this program began, so that "
                    "the run is not recorded; start it again"
                )
            in_a_row = 0
            write_result(results, result)
            screen.print(describe_result(run, result), style="green")
    return failed


@contextmanager
def reserve(left: Sequence[RunSpec], results: Path) -> Iterator[RunSpec | None]:
    """Hold the first run that is neither done nor held by another comparison; None if there is none."""
    for run in left:
        path = results / LOCKS / run.key
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_file(path, taken=ConfigError(f"{run.label} is being done")))
            except ConfigError:
                continue
            stack.callback(path.unlink)
            if result_file(results, run.key).exists():  # since the results were read
                continue
            yield run
            return
    yield None


def find_run(campaign: Campaign, stages: Sequence[str], *, key: str) -> RunSpec:
    """Return the run with this key. Raises ConfigError for one that the plan lacks."""
    runs = {run.key: run for run in campaign.all_runs(stages)}
    if key not in runs:
        raise ConfigError(f"--verify {key}: no run of this plan; expected one of {', '.join(runs)}")
    return runs[key]


async def verify(runner: Runner, screen: Screen, campaign: Campaign, *, run: RunSpec) -> None:
    """Do a run again and print what both took."""
    screen.print(f"run folder: {runner.folder / run.key}")
    again = await runner.run(run, title=f"again: {run.label}")
    screen.console.print(as_rich(verify_table(campaign.results.get(run.key), again)))


def estimate(campaign: Campaign, runs: Sequence[RunSpec]) -> float | None:
    """Return the seconds that runs take on this machine, by those that are done; None: not known yet."""
    return estimate_seconds(runs, campaign.results, pace_s=machine_pace())


def describe_next(campaign: Campaign, run: RunSpec, *, left: Sequence[RunSpec], stages: Sequence[str]) -> str:
    """Return the title of the next run: its number and settings, and the time that all the rest takes."""
    done, total = campaign.count(stages)
    seconds = estimate(campaign, [*left, *campaign.waiting(stages)])
    rest = "" if seconds is None else f", {timedelta(seconds=round(seconds))} left"
    return f"run {done + 1} of {total}{rest}: {run.label}"


def describe_result(run: RunSpec, result: Result) -> str:
    em = [evaluation.em for evaluation in result.evaluations]
    shown = ", ".join("-" if value is None else f"{value:.3f}" for value in (em[0], em[-1])) if em else "-"
    return f"{run.label}: held-out em first and last {shown}; {result.wall_s:.0f} s"


def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Return the exit status: 0; 1 if a run failed or a check of a world did; 130 after a signal."""
    options = parse(argv)
    options.docs, options.work = options.docs.resolve(), options.work.resolve()
    if options.plan.endswith((".yaml", ".yml")):
        options.plan = os.path.relpath(options.plan, ROOT)
    os.chdir(ROOT)  # worlds are named from there
    plan = read_plan(options.plan)
    stages = choose_stages(plan, options.stage)
    places = find_places(options.docs, plan=options.plan)
    # Explicitly: a shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    screen = Screen(Console(width=None if sys.stdout.isatty() else 140))
    failed: dict[str, str] = {}
    if not (options.report or options.list):
        require_device(plan, num_gpus=count_gpus())
        try:
            failed = work(screen, plan, stages=stages, places=places, options=options)
        except (KeyboardInterrupt, asyncio.CancelledError):
            screen.print("interrupted; the run that was not done begins again", style="yellow")
            return 130
        if options.verify:
            return 0
    campaign = make_campaign(plan, read_results(places.results))
    if options.list:
        for run in campaign.left(stages):
            screen.console.print(f"{run.key}  {run.label}", highlight=False)
    else:
        # Of all parts of the plan, not only of those that were asked for.
        every = [name for name in choose_stages(plan, None) if name in stages or is_there(plan, name)]
        page = write_report(campaign, stages=every, places=places, plan=options.plan)
        show(campaign, stages=stages, console=screen.console)
        screen.print(f"report: {page}")
    return finish(campaign, stages=stages, failed=failed)


def work(
    screen: Screen, plan: Plan, *, stages: Sequence[str], places: Places, options: argparse.Namespace
) -> dict[str, str]:
    """Start what runs need, do them, or the one to verify, and stop everything; return what failed."""
    for name in [name for name in os.environ if is_service_variable(name)]:
        del os.environ[name]  # the plan configures the services
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    folder = options.work
    folder.mkdir(parents=True, exist_ok=True)
    taken = ConfigError(f"--work {folder} is in use by another comparison; wait for it or name another")

    async def do(campaign: Campaign, supervisor: Supervisor) -> dict[str, str]:
        cancel_by_signals()
        place, again = folder, None
        if options.verify:
            again = find_run(campaign, stages, key=options.verify)
            place = Path(mkdtemp(dir=folder, prefix="again-"))  # what the recorded run left stays
        runner = Runner(supervisor, screen, folder=place, keeps_episodes=options.keep)
        async with aclosing(runner):
            if again is not None:
                await verify(runner, screen, campaign, run=again)
                return {}
            return await do_runs(
                runner, screen, plan, stages=stages, results=places.results, hours=options.hours
            )

    with lock_file(folder / ".lock", taken=taken), Supervisor() as supervisor:
        # Each is composed once, and kept, which takes up to a minute for all.
        with screen.phase("checking the settings of all runs"):
            campaign = make_campaign(plan, read_results(places.results))
            campaign.count(stages)
        return asyncio.run(do(campaign, supervisor))


def finish(campaign: Campaign, *, stages: Sequence[str], failed: dict[str, str]) -> int:
    """Print the JSON line; return the exit status."""
    done, total = campaign.count(stages)
    unseparated = find_unseparated(campaign, stages)
    line = {
        "done": done,
        "runs": total,
        "left_s": estimate(campaign, [*campaign.left(stages), *campaign.waiting(stages)]),
        "failed": sorted(failed),
        "not_separated": unseparated,
    }
    print(json.dumps(line), flush=True)
    return 1 if failed or unseparated else 0


if __name__ == "__main__":
    with error_line():
        code = main()
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # libraries that vLLM imports report what they leak at the end
    sys.exit(code)

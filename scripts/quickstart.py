"""Run everything end to end: start both services, train on the embedded world, measure, stop everything.

`make quickstart` runs this. It trains with the recipe `quickstart` through the entry point for real models,
`python -m verl.trainer.main_ppo`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from screen import Screen
from worlds import World, open_world

from serving.web.settings import expand_home
from verl.run.tracking import METRICS_FILE, read_metrics
from verl.trainer.config.overrides import in_quotes
from verl.utils.entry import error_line
from verl.utils.supervise import (
    Child,
    MemoryWatch,
    Supervisor,
    free_ports,
    is_service_variable,
    service_environment,
    wait_until_ready,
)

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_STEPS = 30
SMOKE_STEPS = 2
HOST = "127.0.0.1"
RETRIEVER = ("search_r1.search.retrieval_server",)
IG_SERVICE = (
    "IG.service.IG_server", "--num-generations", "8", "--max-new-tokens", "12",
    "--gpu-memory-utilization", "0.2",
)  # fmt: skip
EDGE_STEPS = 5

USAGE = """\
Other worlds have the files of world/, and may add arguments in a file quickstart.json: see docs/real.md.

Everything after -- goes to verl.trainer.main_ppo as overrides:
  make quickstart QUICKSTART_ARGS="--steps 20 -- actor_rollout_ref.actor.optim.lr=1e-4"

The last line of output is one JSON object:
  em_before, em_after     exact match on the held-out questions, greedy, before and after training
  gain_first, gain_last   mean information gain of the searches, first and last 5 steps (null = not measured)
  peak_rss_gb             largest memory of all processes together in 10^9 bytes, looked at every second:
                          the sum of proportional set sizes, so that shared pages count once
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result, in the order of the JSON line."""

    em_before: float | None
    em_after: float | None
    gain_first: float | None
    gain_last: float | None
    steps: int
    seconds: float
    peak_rss_gb: float
    run_dir: str


def count_steps(run_dir: Path) -> int:
    """Return how many training steps the running trainer has recorded."""
    path = run_dir / METRICS_FILE
    return path.read_bytes().count(b'"kind": "train"') if path.is_file() else 0


def summarize(
    rows: Sequence[Mapping[str, float | None]], *, seconds: float, peak_bytes: int, run_dir: Path
) -> Summary:
    """Return the evaluation before the first step, the last one after it, and the gain at both ends."""
    gains = [value for row in rows if (value := row.get("ig/gain_mean")) is not None]
    em = {bool(row["step"]): round(value, 4) for row in rows if (value := row.get("val/em")) is not None}
    return Summary(
        em_before=em.get(False),
        em_after=em.get(True),
        gain_first=round(statistics.fmean(gains[:EDGE_STEPS]), 4) if gains else None,
        gain_last=round(statistics.fmean(gains[-EDGE_STEPS:]), 4) if gains else None,
        steps=max((int(row["step"] or 0) for row in rows), default=0),
        seconds=round(seconds, 1),
        peak_rss_gb=round(peak_bytes / 1e9, 2),
        run_dir=str(run_dir),
    )


def choose_overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the overrides for the arguments, without those that differ in every run (ports, run folder)."""
    default_steps = SMOKE_STEPS if arguments.smoke else DEFAULT_STEPS
    steps = default_steps if arguments.steps is None else arguments.steps
    chosen = [
        f"recipe={'smoke' if arguments.smoke else 'quickstart'}",
        f"trainer.total_training_steps={steps}",
        f"trainer.seed={arguments.seed}",
    ]
    if arguments.gain_weight is not None:
        chosen.append(f"algorithm.gain_weight={arguments.gain_weight}")
    return chosen


def start_services(
    supervisor: Supervisor, screen: Screen, *, world: World, run_dir: Path, timeout_s: float | None
) -> list[str]:
    """Start retriever and IG service side by side and wait for both. Return their addresses."""
    addresses = [f"http://{HOST}:{port}" for port in free_ports(2)]
    children = {}
    with screen.phase("starting the retriever and the IG service") as update:
        for address, name, command, log in zip(
            addresses,
            ("the retriever", "the IG service"),
            ((*RETRIEVER, *world.retriever_flags), (*IG_SERVICE, *world.ig_service_flags)),
            ("retriever.log", "ig_service.log"),
            strict=True,
        ):
            port = address.rpartition(":")[2]
            children[f"{address}/readyz"] = supervisor.start(
                name,
                command=[sys.executable, "-m", *command, "--host", HOST, "--port", port],
                log=run_dir / log,
                cwd=ROOT,
                environment=service_environment(),
            )
        for url, child in wait_until_ready(
            children, timeout_s=timeout_s, on_tick=lambda waiting: update(0, describe_waiting(waiting))
        ):
            screen.print(f"{child.name} is ready at {url.removesuffix('/readyz')}", style="green")
    return addresses


def describe_waiting(waiting: Sequence[Child]) -> str:
    """Return what is waited for, and the last line of the first one's log."""
    names = " and ".join(child.name for child in waiting)
    lines = waiting[0].read_log()
    return f"waiting for {names} to load" + (f" ({lines[-1][:100]})" if lines else "")


def train(
    supervisor: Supervisor, screen: Screen, *, memory: MemoryWatch, overrides: Sequence[str], run_dir: Path
) -> None:
    """Run the trainer to its end and print its lines. Raises ChildFailedError if it or a service fails."""
    total = dict(item.split("=", 1) for item in overrides if "=" in item)["trainer.total_training_steps"]
    with screen.phase("training", total=int(total) if total.isdigit() else None) as update:
        trainer = supervisor.start(
            "the trainer",
            command=[sys.executable, "-m", "verl.trainer.main_ppo", *overrides],
            log=run_dir / "console.log",
            cwd=ROOT,
            environment=service_environment(),
        )
        num_printed = 0
        is_running = True
        while is_running:
            time.sleep(0.5)
            is_running = trainer.process.poll() is None
            lines = trainer.read_log()
            for line in lines[num_printed:]:
                screen.print_line(line)
            num_printed = len(lines)
            step = count_steps(run_dir)
            update(step, f"step {step} of {total}, peak {memory.peak_bytes / 1e9:.1f} GB")
            for service in supervisor.children:
                if service is not trainer:
                    service.check_alive()
        if trainer.process.returncode:
            trainer.check_alive()


def run(
    screen: Screen, *, world: World, run_dir: Path, overrides: Sequence[str], timeout_s: float | None
) -> Summary:
    """Start the services, train, and stop everything again. Raises ChildFailedError."""
    began = time.monotonic()
    with Supervisor() as supervisor, MemoryWatch(supervisor) as memory:
        try:
            retriever, ig_service = start_services(
                supervisor, screen, world=world, run_dir=run_dir, timeout_s=timeout_s
            )
            chosen = [
                f"retriever.url={retriever}/retrieve",
                f"reward.semantic.url={ig_service}",
                f"trainer.default_local_dir={in_quotes(str(run_dir))}",
                *world.overrides,
                *overrides,
            ]
            train(supervisor, screen, memory=memory, overrides=chosen, run_dir=run_dir)
        finally:
            with signals_held():
                screen.print("stopping everything that was started ...")
                supervisor.stop_all()
    seconds = time.monotonic() - began
    rows = read_metrics(run_dir)
    return summarize(rows, seconds=seconds, peak_bytes=memory.peak_bytes, run_dir=run_dir)


@contextmanager
def signals_held() -> Iterator[None]:
    """Ignore further Ctrl-C, which must not interrupt the cleanup."""
    held = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def show(console: Console, summary: Summary) -> None:
    """Print the table, then the JSON line."""
    table = Table(title="quickstart", title_style="bold", show_header=True)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")

    def number(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.3f}"

    table.add_row("exact match, held-out questions", number(summary.em_before), number(summary.em_after))
    table.add_row(
        f"information gain, first and last {EDGE_STEPS} steps",
        number(summary.gain_first),
        number(summary.gain_last),
    )
    table.add_section()
    table.add_row("steps", "", str(summary.steps))
    table.add_row("seconds, everything", "", f"{summary.seconds:.0f}")
    table.add_row("peak memory, all processes", "", f"{summary.peak_rss_gb:.2f} GB")
    console.print(table)
    console.print(f"Look at it: {summary.run_dir}/report.html", soft_wrap=True)
    if any(Path(summary.run_dir, "checkpoints").glob("global_step_*")):
        console.print(f"Talk to it: {write_ask_command(Path(summary.run_dir))}", soft_wrap=True, markup=False)
    console.file.flush()
    print(json.dumps(asdict(summary)), flush=True)


def write_ask_command(run_dir: Path) -> str:
    """Return the command that asks the run's last checkpoint; without arguments it takes the newest run."""
    if run_dir.parent == ROOT / "runs" and run_dir.match("quickstart-*"):
        return "make ask"
    return f"make ask ASK_ARGS={shlex.quote('--model ' + shlex.quote(str(run_dir)))}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; `overrides` are those after `--`."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help=f"training steps (default {DEFAULT_STEPS})")
    parser.add_argument("--gain-weight", type=float, help="weight of the gain (default 0.6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--world", type=Path, default=ROOT / "world", help="its folder (default world)")
    parser.add_argument("--policy", type=Path, help="model to train (default WORLD/models/policy)")
    parser.add_argument("--generator", type=Path, help="of the IG service (default WORLD/models/generator)")
    parser.add_argument("--run-dir", type=Path, help="new folder (default runs/quickstart-<timestamp>)")
    parser.add_argument(
        "--smoke", action="store_true", help=f"{SMOKE_STEPS} small steps, 16 held-out questions"
    )
    parser.add_argument(
        "--service-timeout",
        type=float,
        metavar="S",
        help="give up when a service is not ready after S seconds (default: wait as long as it runs)",
    )
    parser.add_argument("overrides", nargs="*", metavar="-- key=value", help="overrides of the trainer")
    return parser.parse_args(expand_home(argv))


def new_run_dir(asked: Path | None) -> Path:
    """Create the run folder. Exit if it is not empty: a run must not resume another one by accident."""
    run_dir = (asked or ROOT / "runs" / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    if run_dir.exists() and any(run_dir.iterdir()):
        sys.exit(f"error: --run-dir {run_dir} is not empty; name a new folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Return the exit code: 0, 130 on Ctrl-C, 143 on SIGTERM. Raises ChildFailedError."""
    arguments = parse(argv)
    # Explicitly: a shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    world = open_world(arguments.world, policy=arguments.policy, generator=arguments.generator)
    run_dir = new_run_dir(arguments.run_dir)
    screen = Screen(console)
    screen.print(f"run folder: {run_dir}")
    if dropped := sorted(name for name in os.environ if is_service_variable(name)):
        screen.print("ignored, the services are configured here: " + ", ".join(dropped), style="yellow")
    try:
        chosen = [*choose_overrides(arguments), *arguments.overrides]
        summary = run(
            screen, world=world, run_dir=run_dir, overrides=chosen, timeout_s=arguments.service_timeout
        )
    except KeyboardInterrupt:
        screen.print("interrupted; everything was stopped", style="yellow")
        return 130
    show(console, summary)
    return 0


if __name__ == "__main__":
    with error_line():
        sys.exit(main())

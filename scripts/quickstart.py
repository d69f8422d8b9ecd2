"""Run everything end to end: start both services, train on the embedded world, measure, stop everything.

`make quickstart` runs this. It trains with the recipe `quickstart` through the entry point for real models,
`python -m verl.trainer.main_ppo`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from screen import Screen
from supervise import (
    Child,
    ChildFailedError,
    MemoryWatch,
    Supervisor,
    free_ports,
    is_service_variable,
    service_environment,
    wait_until_ready,
)

from serving.logs import safe_text
from serving.web.settings import expand_home
from verl.utils.entry import error_line

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_STEPS = 30
SMOKE_STEPS = 2
IG_SERVICE_ARGUMENTS = ("--num-generations", "8", "--max-new-tokens", "12", "--gpu-memory-utilization", "0.2")

# Values that need no quotes in Hydra's grammar.
PLAIN_WORD = re.compile(r"(?!(?:null|true|false|nan|inf)\Z)[a-z/][a-z0-9_./-]*", re.ASCII | re.IGNORECASE)
HOST = "127.0.0.1"

EDGE_STEPS = 5

USAGE = """\
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


@dataclass(slots=True)
class Metrics:
    """The rows of `metrics.jsonl`; each refresh reads only what was appended."""

    path: Path
    rows: list[dict[str, float | None]] = field(default_factory=list)
    _offset: int = 0

    def refresh(self) -> None:
        """Read the complete lines that were written since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self.rows.append(json.loads(line))

    def values(self, name: str) -> list[float]:
        """Return all measured values of a metric, in order."""
        return [value for row in self.rows if (value := row.get(name)) is not None]

    @property
    def step(self) -> int:
        """The number of training steps done."""
        return max((int(value) for value in self.values("step")), default=0)


def summarize(metrics: Metrics, *, seconds: float, peak_bytes: int, run_dir: Path) -> Summary:
    """Return the first and last evaluation and the gain at both ends of the run."""
    em, gains = metrics.values("val/em"), metrics.values("ig/gain_mean")
    return Summary(
        em_before=round(em[0], 4) if em else None,
        em_after=round(em[-1], 4) if len(em) > 1 else None,
        gain_first=round(statistics.fmean(gains[:EDGE_STEPS]), 4) if gains else None,
        gain_last=round(statistics.fmean(gains[-EDGE_STEPS:]), 4) if gains else None,
        steps=metrics.step,
        seconds=round(seconds, 1),
        peak_rss_gb=round(peak_bytes / 1e9, 2),
        run_dir=str(run_dir),
    )


def choose_overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the overrides for the arguments, without those that differ in every run (ports, run folder)."""
    default_steps = SMOKE_STEPS if arguments.smoke else DEFAULT_STEPS
    steps = default_steps if arguments.steps is None else arguments.steps
    chosen = {
        "recipe": "smoke" if arguments.smoke else "quickstart",
        "trainer.total_training_steps": steps,
        "trainer.seed": arguments.seed,
    }
    if arguments.gain_weight is not None:
        chosen["algorithm.gain_weight"] = arguments.gain_weight
    return [override(key, value) for key, value in chosen.items()]


def override(key: str, value: str | int | float) -> str:
    """Return `key=value`, quoted so that Hydra's grammar reads exactly this value."""
    if not isinstance(value, str) or PLAIN_WORD.fullmatch(value):
        return f"{key}={value}"
    # Inside quotes a backslash is one character, except before a quote.
    escaped = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value).replace("'", r"\'")
    return f"{key}='{escaped}'"


def start_services(
    supervisor: Supervisor, screen: Screen, *, run_dir: Path, timeout_s: float | None
) -> tuple[int, int]:
    """Start retriever and IG service side by side and wait for both. Return their ports."""
    retriever_port, gain_port = free_ports(2)
    retriever_command = ["search_r1.search.retrieval_server", "--host", HOST, "--port", str(retriever_port)]
    gain_command = ["IG.service.IG_server", "--host", HOST, "--port", str(gain_port), *IG_SERVICE_ARGUMENTS]
    with screen.phase("starting the retriever and the IG service") as update:
        children = {
            f"http://{HOST}:{port}/readyz": supervisor.start(
                name,
                command=[sys.executable, "-m", *command],
                log=run_dir / log,
                cwd=ROOT,
                environment=service_environment(),
            )
            for port, name, command, log in (
                (retriever_port, "the retriever", retriever_command, "retriever.log"),
                (gain_port, "the IG service", gain_command, "ig_service.log"),
            )
        }
        for url, child in wait_until_ready(
            children, timeout_s=timeout_s, on_tick=lambda waiting: update(0, describe_waiting(waiting))
        ):
            screen.print(f"{child.name} is ready at {url.removesuffix('/readyz')}", style="green")
    return retriever_port, gain_port


def describe_waiting(waiting: Sequence[Child]) -> str:
    """Return what is waited for, and the last line of the first one's log."""
    names = " and ".join(child.name for child in waiting)
    last = waiting[0].read_log_end(1)
    return f"waiting for {names} to load" + (f" ({last[0][:100]})" if last else "")


def train(
    supervisor: Supervisor, screen: Screen, *, memory: MemoryWatch, overrides: Sequence[str], run_dir: Path
) -> Metrics:
    """Run the trainer to its end and print its lines. Raises ChildFailedError if it or a service fails."""
    metrics = Metrics(path=run_dir / "metrics.jsonl")
    total = dict(item.split("=", 1) for item in overrides if "=" in item)["trainer.total_training_steps"]
    steps = int(total) if total.isdigit() else None
    with screen.phase("training", total=steps) as update:
        trainer = supervisor.start(
            "the trainer",
            command=[sys.executable, "-m", "verl.trainer.main_ppo", *overrides],
            log=run_dir / "console.log",
            cwd=ROOT,
            environment=service_environment(),
            on_line=screen.print_line,
        )
        while trainer.process.poll() is None:
            metrics.refresh()
            update(metrics.step, f"step {metrics.step} of {total}, peak {memory.peak_bytes / 1e9:.1f} GB")
            for service in supervisor.children:
                if service is not trainer:
                    service.check_alive()
            time.sleep(0.5)
        if trainer.process.returncode:
            trainer.check_alive()
    metrics.refresh()
    return metrics


def run(screen: Screen, *, run_dir: Path, overrides: Sequence[str], timeout_s: float | None) -> Summary:
    """Start the services, train, and stop everything again. Raises ChildFailedError."""
    began = time.monotonic()
    with Supervisor() as supervisor, MemoryWatch(supervisor) as memory:
        try:
            retriever_port, gain_port = start_services(
                supervisor, screen, run_dir=run_dir, timeout_s=timeout_s
            )
            addresses = [
                override("retriever.url", f"http://{HOST}:{retriever_port}/retrieve"),
                override("reward.semantic.url", f"http://{HOST}:{gain_port}"),
                override("trainer.default_local_dir", str(run_dir)),
            ]
            chosen = [*addresses, *overrides]
            metrics = train(supervisor, screen, memory=memory, overrides=chosen, run_dir=run_dir)
        finally:
            with signals_held():
                screen.print("stopping everything that was started ...")
                supervisor.stop_all()
    return summarize(metrics, seconds=time.monotonic() - began, peak_bytes=memory.peak_bytes, run_dir=run_dir)


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
    console.file.flush()
    print(json.dumps(asdict(summary)), flush=True)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this script's own arguments, and the overrides after `--`."""
    own, overrides = list(argv), []
    if "--" in own:
        cut = own.index("--")
        own, overrides = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help=f"training steps (default {DEFAULT_STEPS})")
    parser.add_argument("--gain-weight", type=float, help="weight of the gain (default 0.6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
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
    parser.add_argument(
        "--print-overrides", action="store_true", help="print the trainer's arguments, do nothing"
    )
    return parser.parse_args(expand_home(own)), overrides


def new_run_dir(asked: Path | None) -> Path:
    """Create the run folder. Exit if it is not empty: a run must not resume another one by accident."""
    run_dir = (asked or ROOT / "runs" / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    if run_dir.exists() and any(run_dir.iterdir()):
        sys.exit(f"error: --run-dir {run_dir} is not empty; name a new folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Return the exit code: 0, 1 when something failed, 130 on Ctrl-C, 143 on SIGTERM."""
    arguments, extra = parse(argv)
    overrides = choose_overrides(arguments)
    if arguments.print_overrides:
        print("\n".join(overrides))
        return 0
    # Explicitly: a shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    run_dir = new_run_dir(arguments.run_dir)
    screen = Screen(console)
    screen.print(f"run folder: {run_dir}")
    if dropped := sorted(name for name in os.environ if is_service_variable(name)):
        screen.print("ignored, the services are configured here: " + ", ".join(dropped), style="yellow")
    try:
        chosen = [*overrides, *extra]
        summary = run(screen, run_dir=run_dir, overrides=chosen, timeout_s=arguments.service_timeout)
    except ChildFailedError as error:
        console.print(
            f"error: {safe_text(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        screen.print("interrupted; everything was stopped", style="yellow")
        return 130
    show(console, summary)
    return 0


if __name__ == "__main__":
    with error_line():
        sys.exit(main())

"""Measure on one GPU what the plan assumes: the first thing to run on a machine with a GPU.

    make gpu-check              or, where only torch and transformers are installed:
    python3 scripts/gpu_check.py [--results FILE] [--seconds 480] [--dry-run] [CHECK ...]

Every figure is appended to FILE as a line of JSON as soon as it is measured. A check that did not end is
repeated by the next call, one that did is not (delete FILE to measure again). Weights are random and nothing
is downloaded. The table at the end has beside each figure what the plan expects, and the name in
verl/trainer/plan/assumptions.py of the number that it should replace. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project need not be installed

import torch  # noqa: E402
from gpu_checks.engine import check_engine  # noqa: E402
from gpu_checks.policy import check_attention, check_policy  # noqa: E402
from gpu_checks.recorder import Bench, append, read_lines  # noqa: E402
from gpu_checks.services import check_device, check_entailment, check_search  # noqa: E402
from gpu_checks.transfer import check_offload, check_publish  # noqa: E402

from verl.trainer.plan.gpus import Gpu, identify_gpu  # noqa: E402

_KILL_WAIT_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What one process measures."""

    name: str
    run: Callable[[Bench], None]
    limit_s: float
    """It is ended after this time; all of them together take at most 8 minutes."""


CHECKS = (
    Check(name="device", run=check_device, limit_s=20),
    Check(name="attention", run=check_attention, limit_s=25),
    Check(name="policy_3b", run=partial(check_policy, size="3B"), limit_s=65),
    Check(name="engine", run=check_engine, limit_s=190),
    Check(name="publish", run=check_publish, limit_s=25),
    Check(name="entailment", run=check_entailment, limit_s=20),
    Check(name="search", run=check_search, limit_s=15),
    Check(name="offload", run=check_offload, limit_s=30),
    Check(name="lora_1.5b", run=partial(check_policy, size="1.5B", lora_rank=32), limit_s=45),
    Check(name="policy_1.5b", run=partial(check_policy, size="1.5B"), limit_s=45),
)
"""The most important first."""
DRY_RUN = Gpu(name="dry run", memory=85e9)


def main() -> int:
    """Return the exit status: 0 if every check that was asked for has its figures."""
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--results", type=Path, default=Path("gpu-check.jsonl"), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=480, help="for all checks (default: %(default)g)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; figures mean nothing")
    options = parser.parse_args()
    if unknown := sorted({*options.checks} - {*names}):
        parser.error(f"{', '.join(unknown)}: no such check; there are {', '.join(names)}")
    gpu = DRY_RUN if options.dry_run else _find_gpu()
    if gpu is None:
        print(
            "error: torch finds no GPU; run this where there is one (make doctor), or with --dry-run",
            file=sys.stderr,
        )
        return 1
    _import_models()
    chosen = [check for check in CHECKS if not options.checks or check.name in options.checks]
    run_checks(chosen, results=options.results, gpu=gpu, seconds=options.seconds)
    return show(chosen, results=options.results, gpu=gpu)


def _find_gpu() -> Gpu | None:
    """Return the first visible GPU, without using CUDA here: the processes of the checks are forked."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_ask_torch)


def _ask_torch() -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return identify_gpu(found.name, found.total_memory)


def _import_models() -> None:
    """Import them once, before the processes of the checks are forked: it takes seconds."""
    from transformers import AutoModelForCausalLM, DebertaV2ForSequenceClassification, Qwen2ForCausalLM  # noqa: F401


def run_checks(checks: Sequence[Check], *, results: Path, gpu: Gpu, seconds: float) -> None:
    """Run each check that has not ended before, in a process of its own, while there is time."""
    end = time.monotonic() + seconds
    for check in checks:
        if _status(read_lines(results, device=gpu.name), check.name) == "ok":
            continue
        limit_s = min(check.limit_s, end - time.monotonic())
        began = time.monotonic()
        if limit_s <= 0:
            status = f"not run: the {seconds:g} s were used up"
        else:
            print(f"{check.name}: at most {limit_s:.0f} s", flush=True)
            status = _run(check, results=results, gpu=gpu, limit_s=limit_s)
        took = round(time.monotonic() - began, 1)
        append(results, {"check": check.name, "device": gpu.name, "status": status, "seconds": took})


def _run(check: Check, *, results: Path, gpu: Gpu, limit_s: float) -> str:
    """Return how a check ended: ok, or why not."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        bench = Bench(
            check=check.name,
            results=results,
            scratch=Path(scratch),
            gpu=gpu,
            device=torch.device("cpu" if gpu is DRY_RUN else "cuda"),
            is_tiny=gpu is DRY_RUN,
        )
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(check, bench, sender))
        process.start()
        sender.close()
        status = f"ended after its limit of {limit_s:.0f} s"
        try:
            if receiver.poll(limit_s):
                status = receiver.recv()
        except EOFError:
            process.join(_KILL_WAIT_S)
            status = f"failed: its process ended with exit code {process.exitcode}"
        finally:
            _kill(process)
    return status


def _measure(check: Check, bench: Bench, sender: multiprocessing.connection.Connection) -> None:
    os.setsid()  # with its own children it is a group that can be ended
    try:
        check.run(bench)
        sender.send("ok")
    except BaseException as error:
        traceback.print_exc()
        sender.send(f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join(_KILL_WAIT_S)


def show(checks: Sequence[Check], *, results: Path, gpu: Gpu) -> int:
    """Print figures, and a line of JSON; return the exit status."""
    lines = read_lines(results, device=gpu.name)
    statuses = {check.name: _status(lines, check.name) for check in checks}
    figures = {
        (str(line["check"]), str(line["figure"])): line
        for line in lines
        if "figure" in line and line["check"] in statuses
    }
    print(f"\n{gpu.name}: measured, planned, unit, number of assumptions.py that it should replace")
    for (check, name), line in figures.items():
        numbers = f"{_short(line['value']):>12}  {_short(line['planned']):>10}"
        print(f"{check + '.' + name:<36}{numbers}  {line['unit']}  {line['assumption'] or ''}".rstrip())
    for check, status in statuses.items():
        print(f"{check}: {status}")
    if gpu is DRY_RUN:
        print("A dry run on the CPU with tiny models: the figures mean nothing.")
    values = {f"{check}.{name}": line["value"] for (check, name), line in figures.items()}
    print(json.dumps({"device": gpu.name, **values, "status": statuses}))
    return 0 if set(statuses.values()) == {"ok"} else 1


def _status(lines: Sequence[dict[str, object]], check: str) -> str | None:
    """Return how a check ended last; None if it never did."""
    found = [str(line["status"]) for line in lines if line["check"] == check and "status" in line]
    return found[-1] if found else None


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value if value is not None else "-")


if __name__ == "__main__":
    sys.exit(main())

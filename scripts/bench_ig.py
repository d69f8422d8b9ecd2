"""Measure the throughput of the IG service, and its share of the bare engine's.

`make bench-ig` runs this. Every step is 8 new questions with 4 rollouts each, asked for one rollout at a time
and all at once, as the trainer does. In the same run, and in turn, vLLM's `LLM.generate` samples all distinct
prompts of the step at once: the same samples, without gains. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.table import Table
from screen import Screen

from bench import engine
from bench.command import run_bench
from bench.service import read_counters, start_ig_service
from bench.workload import QUESTIONS, ROLLOUTS, Rollout, world_steps
from IG.client import GainRequest, IGClient
from IG.config import IGServiceConfig, resolve_config
from IG.prompts import PromptType, build_prompt
from verl.utils.entry import error_line
from verl.utils.supervise import ChildFailedError, Supervisor

ANSWERS, MAX_NEW_TOKENS = 10, 16
ENGINE_SEQUENCES = 512
TIMEOUT_S = 120.0
BASELINES, PAIRS = 'ig_baselines_total{source="sampled"}', 'ig_pairs_total{source="judged"}'


@dataclass(slots=True)
class Measured:
    """Seconds by step, and counts of all steps."""

    service_s: list[float] = field(default_factory=list)
    engine_s: list[float] = field(default_factory=list)
    engine_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    baselines: int = 0
    pairs: int = 0


def main() -> int:
    """Return the exit status: 0 measured, 1 something could not be started or sampled differently."""
    arguments = parse_arguments()
    steps = world_steps(num_steps=arguments.steps + 1, seed=arguments.seed)

    def measure_all(screen: Screen, folder: Path) -> dict[str, float]:
        with Supervisor() as supervisor:
            log = folder / "ig_service.log"
            return run(supervisor, screen, workers=arguments.workers, steps=steps, log=log)

    return run_bench(measure_all, name="bench-ig")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of 32 items (default 12)")
    parser.add_argument("--workers", type=int, default=1, help="workers of the service (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the workload (default 0)")
    return parser.parse_args()


def run(
    supervisor: Supervisor, screen: Screen, *, workers: int, steps: Sequence[Sequence[Rollout]], log: Path
) -> dict[str, float]:
    """Start service and engine, warm both up with the first step, measure the others; return the figures."""
    flags = [
        *("--num-workers", str(workers), "--sub-batch-size", str(ENGINE_SEQUENCES)),
        *("--num-generations", str(ANSWERS), "--max-new-tokens", str(MAX_NEW_TOKENS)),
    ]
    config = resolve_config(flags, environ={})
    with screen.phase("starting the service") as update:
        url = start_ig_service(supervisor, arguments=flags, log=log, update=update)
    spawn = multiprocessing.get_context("spawn")
    arguments = (config, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(1, spawn, initializer=engine.load, initargs=arguments) as bare:
        with screen.phase("loading the bare engine"):
            decode(bare, prompts_of(steps[0]), config)
        measured = asyncio.run(measure(screen, url=url, bare=bare, steps=steps, config=config))
    figures = summarize(measured, steps=steps[1:], workers=workers)
    screen.console.print(table(figures, measured))
    return figures


async def measure(
    screen: Screen,
    *,
    url: str,
    bare: ProcessPoolExecutor,
    steps: Sequence[Sequence[Rollout]],
    config: IGServiceConfig,
) -> Measured:
    """Give every step to service and engine in turn; the first step warms up and is not counted."""
    measured = Measured()
    client = IGClient(url, timeout_s=TIMEOUT_S)
    try:
        await ask(client, steps[0])
        before = read_counters(url)
        with screen.phase("measuring", total=len(steps) - 1) as update:
            for number, rollouts in enumerate(steps[1:], start=1):
                began = time.perf_counter()
                measured.latencies_s += await ask(client, rollouts)
                measured.service_s.append(time.perf_counter() - began)
                decoded = await asyncio.to_thread(decode, bare, prompts_of(rollouts), config)
                measured.engine_s.append(decoded.seconds)
                measured.engine_tokens += decoded.num_tokens
                update(number, f"{len(rollouts) / measured.service_s[-1]:.0f} items/s")
        after = read_counters(url)
    finally:
        await client.aclose()
    measured.baselines = int(after[BASELINES] - before[BASELINES])
    measured.pairs = int(after[PAIRS] - before[PAIRS])
    require_same_samples(url, bare, steps[1], config)
    return measured


async def ask(client: IGClient, rollouts: Sequence[Rollout]) -> list[float]:
    """Ask for all gains at once; return the latency of each. Raises ChildFailedError for a failed gain."""

    async def one(rollout: Rollout) -> float:
        began = time.perf_counter()
        result = await client.submit(
            GainRequest(question=rollout.question, context=rollout.context, golds=rollout.golds)
        )
        if result.gain is None:
            raise ChildFailedError(f"a gain failed: {result.error}")
        return time.perf_counter() - began

    return list(await asyncio.gather(*(one(rollout) for rollout in rollouts)))


def prompts_of(rollouts: Sequence[Rollout]) -> list[str]:
    """Return every distinct prompt of a step, as the service samples it."""
    contexts = [(rollout.question, context) for rollout in rollouts for context in ("", rollout.context)]
    return list(dict.fromkeys(prompt(*both) for both in contexts))


def prompt(question: str, context: str) -> str:
    return build_prompt(question, context=context, prompt_type=PromptType.default, max_context_words=4096)


def decode(bare: ProcessPoolExecutor, prompts: Sequence[str], config: IGServiceConfig) -> engine.Decoded:
    """Sample from the prompts in the bare engine's process."""
    return bare.submit(engine.decode, prompts, config).result()


def require_same_samples(
    url: str, bare: ProcessPoolExecutor, rollouts: Sequence[Rollout], config: IGServiceConfig
) -> None:
    """Raise ChildFailedError unless service and engine sample the same: else the comparison is unfair."""
    body = {"items": [rollout.as_item() for rollout in rollouts]}
    answer = httpx.post(f"{url}/compute_info_gain", json=body, timeout=TIMEOUT_S, trust_env=False)
    of_service = {
        prompt(r.question, r.context): [one["text"] for one in detail["with_context"]]
        for r, detail in zip(rollouts, answer.raise_for_status().json()["details"], strict=True)
    }
    decoded = decode(bare, list(of_service), config)
    for (text, expected), answers in zip(of_service.items(), decoded.texts, strict=True):
        if answers != expected:
            raise ChildFailedError(f"service and engine sampled differently for {text!r}")


def summarize(measured: Measured, *, steps: Sequence[Sequence[Rollout]], workers: int) -> dict[str, float]:
    """Return the figures of all measured steps, in the order of the JSON line."""
    num_items = sum(len(step) for step in steps)
    cuts = statistics.quantiles([1000 * latency for latency in measured.latencies_s], n=100)
    return {
        "items_per_s": round(num_items / sum(measured.service_s), 1),
        "vs_engine": round(sum(measured.engine_s) / sum(measured.service_s), 3),
        "baseline_calls": measured.baselines,
        "baseline_calls_naive": num_items,
        "nli_pairs": measured.pairs,
        "nli_pairs_naive": sum(naive_pairs(rollout) for step in steps for rollout in step),
        "p50_ms": round(cuts[49], 1),
        "p99_ms": round(cuts[98], 1),
        "workers": workers,
        "steps": len(steps),
    }


def naive_pairs(rollout: Rollout) -> int:
    """Count directed pairs of both conditions: all answers with each other and with every gold answer."""
    return 2 * (ANSWERS * (ANSWERS - 1) + 2 * ANSWERS * len(rollout.golds))


def table(figures: dict[str, float], measured: Measured) -> Table:
    """Return the result for the terminal."""
    shape = f"{figures['steps']} x {QUESTIONS} x {ROLLOUTS} items"
    title = f"IG service: {shape}, workers: {figures['workers']}"
    shown = Table("", "service", "compared with", "ratio", title=title)
    rate = measured.engine_tokens / sum(measured.service_s)
    limit = measured.engine_tokens / sum(measured.engine_s)
    shown.add_row("items/s", f"{figures['items_per_s']}")
    shown.add_row("tokens/s, bare engine", f"{rate:.0f}", f"{limit:.0f}", f"{figures['vs_engine']}")
    for name, key in (
        ("baselines sampled, one per item", "baseline_calls"),
        ("entailment pairs, all of them", "nli_pairs"),
    ):
        count, naive = figures[key], figures[f"{key}_naive"]
        shown.add_row(name, f"{count}", f"{naive}", f"{count / naive:.2f}")
    latencies = f"{figures['p50_ms']} / {figures['p99_ms']}"
    shown.add_row("milliseconds until a gain, median / 99 %", latencies)
    return shown


if __name__ == "__main__":
    with error_line():
        sys.exit(main())

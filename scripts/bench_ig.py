"""How fast is the IG service? A GRPO-shaped workload, against its limit and against the straightforward way.

`make bench-ig` runs this. Every step is 8 new questions with 4 rollouts each, asked for one rollout at a time
and all at once, as the trainer does. The same steps go, in turn and in the same run, to

    the bare engine     vLLM's `LLM.generate`, all distinct prompts of the step at once: the same samples
    item by item        transformers `generate` with and without the context, then all entailment pairs
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from rich.console import Console
from rich.table import Table
from screen import Screen
from supervise import ChildFailedError, Supervisor

from bench import engine, item_by_item
from bench.service import WORLD, read_counters, start_ig_service
from bench.workload import Rollout, grpo_steps, load_evidence
from IG.client import GainRequest, IGClient
from IG.prompts import PromptType, build_prompt
from IG.sampler import SamplingOptions
from IG.service.config import resolve_config
from IG.service.IG_worker import engine_options, sampling_options
from verl.utils.entry import error_line

QUESTIONS, ROLLOUTS, ANSWERS, MAX_NEW_TOKENS = 8, 4, 10, 16
ENGINE_SEQUENCES = 512
TIMEOUT_S = 120.0
BASELINES, PAIRS = 'ig_baselines_total{source="sampled"}', 'ig_pairs_total{source="judged"}'


@dataclass(slots=True)
class Measured:
    """Seconds and counts, step by step."""

    service_s: list[float] = field(default_factory=list)
    engine_s: list[float] = field(default_factory=list)
    engine_tokens: int = 0
    item_by_item_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    baselines: int = 0
    pairs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result, in the order of the JSON line."""

    items_per_s: float
    vs_item_by_item: float | None
    vs_engine: float
    baseline_calls: int
    baseline_calls_naive: int
    nli_pairs: int
    nli_pairs_naive: int
    p50_ms: float
    p99_ms: float
    workers: int
    steps: int


def main() -> int:
    """Exit status: 0 measured, 1 something could not be started or gave other samples."""
    arguments = parse_arguments()
    screen = Screen(Console(stderr=False))
    steps = grpo_steps(
        load_evidence(WORLD / "doctor.jsonl"),
        num_steps=arguments.steps + 1,
        questions=QUESTIONS,
        rollouts=ROLLOUTS,
        seed=arguments.seed,
    )
    try:
        with Supervisor() as supervisor, TemporaryDirectory(prefix="bench-ig-") as folder:
            summary = run(supervisor, screen, arguments=arguments, steps=steps, folder=Path(folder))
    except ChildFailedError as error:
        screen.say(str(error), style="bold red")
        return 1
    print(json.dumps(asdict(summary)))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of 32 items (default 12)")
    parser.add_argument("--naive-steps", type=int, default=2, help="of them also item by item (default 2)")
    parser.add_argument("--workers", type=int, default=1, help="workers of the service (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the workload (default 0)")
    return parser.parse_args()


def run(
    supervisor: Supervisor,
    screen: Screen,
    *,
    arguments: argparse.Namespace,
    steps: Sequence[Sequence[Rollout]],
    folder: Path,
) -> Summary:
    """Start all three, warm them up with the first step, measure the others."""
    chosen = service_arguments(workers=arguments.workers)
    config = resolve_config(chosen, environ={})
    cores = os.cpu_count() or 1
    sampling = sampling_options(config)
    with screen.phase("starting the service") as update:
        url = start_ig_service(supervisor, arguments=chosen, log=folder / "ig_service.log", update=update)
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(
            1, spawn, initializer=engine.load, initargs=(engine_options(config, cores=cores), sampling)
        ) as bare,
        ProcessPoolExecutor(
            1,
            spawn,
            initializer=item_by_item.load,
            initargs=(config.model_path, config.entailment_model, ANSWERS, MAX_NEW_TOKENS, cores),
        ) as pipeline,
    ):
        with screen.phase("loading the bare engine and the item-by-item pipeline"):
            decode(bare, prompts_of(steps[0]), sampling)
            pipeline.submit(item_by_item.measure, steps[0][:1]).result()
        measured = asyncio.run(
            measure(
                screen,
                url=url,
                bare=bare,
                pipeline=pipeline,
                steps=steps,
                naive_steps=arguments.naive_steps,
                sampling=sampling,
            )
        )
    summary = summarise(measured, steps=steps[1:], workers=arguments.workers)
    screen.console.print(table(summary, measured))
    return summary


async def measure(
    screen: Screen,
    *,
    url: str,
    bare: ProcessPoolExecutor,
    pipeline: ProcessPoolExecutor,
    steps: Sequence[Sequence[Rollout]],
    naive_steps: int,
    sampling: SamplingOptions,
) -> Measured:
    """Every step to each of the three, in turn; the first step warms up and is not counted."""
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
                decoded = await asyncio.to_thread(decode, bare, prompts_of(rollouts), sampling)
                measured.engine_s.append(decoded.seconds)
                measured.engine_tokens += decoded.num_tokens
                if number <= naive_steps:
                    update(number, "item by item, this takes a while")
                    seconds, _ = await asyncio.wrap_future(pipeline.submit(item_by_item.measure, rollouts))
                    measured.item_by_item_s.append(seconds)
                update(number, f"{len(rollouts) / measured.service_s[-1]:.0f} items/s")
        after = read_counters(url)
    finally:
        await client.aclose()
    measured.baselines = int(after[BASELINES] - before[BASELINES])
    measured.pairs = int(after[PAIRS] - before[PAIRS])
    require_same_samples(url, bare, steps[1], sampling)
    return measured


async def ask(client: IGClient, rollouts: Sequence[Rollout]) -> list[float]:
    """Seconds until each gain was there, all asked for at once. Raises ChildFailedError for a failed gain."""

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
    """Every distinct prompt of a step, as the service samples it."""
    return list(
        dict.fromkeys(p for r in rollouts for p in (prompt(r.question, ""), prompt(r.question, r.context)))
    )


def decode(bare: ProcessPoolExecutor, prompts: Sequence[str], sampling: SamplingOptions) -> engine.Decoded:
    """What the bare engine makes of these prompts."""
    return bare.submit(engine.decode, prompts, sampling).result()


def require_same_samples(
    url: str, bare: ProcessPoolExecutor, rollouts: Sequence[Rollout], sampling: SamplingOptions
) -> None:
    """The comparison is fair only if both sampled the same. Raises ChildFailedError if not."""
    request = urllib.request.Request(
        f"{url}/compute_info_gain",
        data=json.dumps({"items": [rollout.as_item() for rollout in rollouts]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        details = json.load(answer)["details"]
    of_service = {
        prompt(r.question, r.context): [one["text"] for one in detail["with_context"]]
        for r, detail in zip(rollouts, details, strict=True)
    }
    prompts = list(of_service)
    decoded = decode(bare, prompts, sampling)
    for text, answers in zip(prompts, decoded.texts, strict=True):
        if answers != of_service[text]:
            raise ChildFailedError(f"service and engine sampled differently for {text!r}")


def prompt(question: str, context: str) -> str:
    return build_prompt(question, context=context, prompt_type=PromptType.default, max_context_words=4096)


def service_arguments(*, workers: int) -> list[str]:
    """The settings that the service and the bare engine share."""
    return [
        *("--num-workers", str(workers), "--sub-batch-size", str(ENGINE_SEQUENCES)),
        *("--num-generations", str(ANSWERS), "--max-new-tokens", str(MAX_NEW_TOKENS)),
    ]


def summarise(measured: Measured, *, steps: Sequence[Sequence[Rollout]], workers: int) -> Summary:
    """Ratios over the same steps only."""
    num_items = sum(len(step) for step in steps)
    naive = len(measured.item_by_item_s)
    millis = sorted(1000 * latency for latency in measured.latencies_s)
    cuts = statistics.quantiles(millis, n=100)
    return Summary(
        items_per_s=round(num_items / sum(measured.service_s), 1),
        vs_item_by_item=round(sum(measured.item_by_item_s) / sum(measured.service_s[:naive]), 2)
        if naive
        else None,
        vs_engine=round(sum(measured.engine_s) / sum(measured.service_s), 3),
        baseline_calls=measured.baselines,
        baseline_calls_naive=num_items,
        nli_pairs=measured.pairs,
        nli_pairs_naive=sum(naive_pairs(rollout) for step in steps for rollout in step),
        p50_ms=round(cuts[49], 1),
        p99_ms=round(cuts[98], 1),
        workers=workers,
        steps=len(steps),
    )


def naive_pairs(rollout: Rollout) -> int:
    """Directed pairs of both conditions: all answers among each other, and with every gold, both ways."""
    return 2 * (ANSWERS * (ANSWERS - 1) + 2 * ANSWERS * len(rollout.golds))


def table(summary: Summary, measured: Measured) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"IG service: {summary.steps} x {QUESTIONS} x {ROLLOUTS} items, workers: {summary.workers}"
    )
    for column in ("", "service", "compared with", "ratio"):
        shown.add_column(column, justify="left" if not column else "right")
    items = QUESTIONS * ROLLOUTS
    naive = len(measured.item_by_item_s)
    if naive:
        slow = items * naive / sum(measured.item_by_item_s)
        shown.add_row(
            "items/s, item by item", f"{summary.items_per_s}", f"{slow:.2f}", f"{summary.vs_item_by_item} x"
        )
    rate = measured.engine_tokens / sum(measured.service_s)
    limit = measured.engine_tokens / sum(measured.engine_s)
    shown.add_row("tokens/s, bare engine", f"{rate:.0f}", f"{limit:.0f}", f"{summary.vs_engine} x")
    shown.add_row(
        "baselines sampled, one per item",
        f"{summary.baseline_calls}",
        f"{summary.baseline_calls_naive}",
        f"{summary.baseline_calls / summary.baseline_calls_naive:.2f}",
    )
    shown.add_row(
        "entailment pairs, all of them",
        f"{summary.nli_pairs}",
        f"{summary.nli_pairs_naive}",
        f"{summary.nli_pairs / summary.nli_pairs_naive:.2f}",
    )
    shown.add_row("milliseconds until a gain, median / 99 %", f"{summary.p50_ms} / {summary.p99_ms}", "", "")
    memory = psutil.virtual_memory()
    shown.caption = f"{os.cpu_count()} cores, {memory.total / 1e9:.0f} GB"
    return shown


if __name__ == "__main__":
    with error_line():
        sys.exit(main())

"""Measure what each method adds to a training step, and how close a step is to its bare engines.

`make bench-step` runs this on the embedded world. All methods measure the same trajectories, of other
questions in every repetition, because the IG service remembers what it has sampled and judged. They have
the format of the embedded policy, so that `ig_search` finds no summaries. Costs are processor seconds of
all processes and visible wall seconds, both as a share of a `search_r1` step measured in the same run. One
update takes the whole batch, as in the quickstart; with `actor_rollout_ref.actor.ppo_mini_batch_size=40`
there are two, which need old log-probs, and those come from the same pass as the gains. The last line of
the output is JSON:

  step_cpu_s, step_s       a search_r1 step: processor seconds of all processes, wall seconds
  overhead                 processor seconds that a method adds, as a share of step_cpu_s
  overhead_visible         wall seconds that it adds to a step, as a share of step_s
  tokens_scored_vs_naive   tokens of its forward passes over those of one pass per state
  turns                    milliseconds of scoring trajectories of 1 to 8 turns, sharing prefixes or not
  rollout_vs_engine        wall seconds of vLLM alone for the same tokens over those of the rollout
  update_vs_torch          wall seconds of a plain torch loop on the same batches over those of the update
  decoded_over_useful      sampled tokens over those that the update trained on
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table
from screen import Screen

from bench import bare
from bench.command import run_bench
from bench.service import start_ig_service
from bench.step import Batch, Cost, CountingScorer, Method
from serving.processes import count_processor_seconds
from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Algorithm, Need
from verl.algorithms.statistics import spread
from verl.branches import Branch, Tree
from verl.errors import ConfigError
from verl.rollout.tokenizer import HfTokenizer
from verl.trainer.build import make_reward, make_services, open_trainer
from verl.trainer.config.loading import compose_config
from verl.trainer.config.schema import Config
from verl.trainer.launch import Models
from verl.trainer.needs import USE_IG_SERVICE
from verl.trainer.ppo.trainer import PPOTrainer
from verl.utils.entry import error_line
from verl.utils.reward_score.IG_client import GainClient
from verl.utils.supervise import Supervisor, start_service
from verl.workers.batch import build_batch

WARM_UP_STEPS = 1
SCORED_TURNS = (1, 2, 4, 8)
IG_FLAGS = ("--num-generations", "8", "--max-new-tokens", "12")


def main() -> int:
    """Return the exit status: 0 measured, 1 something could not be started."""
    arguments = parse_arguments()

    def measure_all(screen: Screen, folder: Path) -> dict[str, object]:
        with Supervisor() as supervisor:
            return run(supervisor, screen, arguments, folder=folder)

    return run_bench(measure_all, name="bench-step")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="measured search_r1 steps (default 6)")
    parser.add_argument(
        "--repeats", type=int, default=4, help="batches that each method measures (default 4)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[name for name in ALGORITHMS if name != "search_r1"],
        metavar="NAME",
        help="methods to measure (default: all)",
    )
    parser.add_argument("overrides", nargs="*", help="settings of the trainer, as key=value")
    return parser.parse_args()


def run(
    supervisor: Supervisor, screen: Screen, arguments: argparse.Namespace, *, folder: Path
) -> dict[str, object]:
    """Start the services and the trainer, measure, and return the figures."""
    with screen.phase("starting the retriever") as update:
        url = start_service(
            supervisor,
            "the retriever",
            module="search_r1.search.retrieval_server",
            arguments=[],
            log=folder / "retriever.log",
            update=update,
        )
    overrides = [
        "recipe=quickstart",
        "algorithm=search_r1",
        f"retriever.url={url}/retrieve",
        f"trainer.default_local_dir={folder / 'run'}",
        "trainer.logger=[]",
        "trainer.val_before_train=false",
        *arguments.overrides,
    ]
    if any(ALGORITHMS[name].needs & USE_IG_SERVICE for name in arguments.methods):
        with screen.phase("starting the IG service") as update:
            ig_url = start_ig_service(
                supervisor, arguments=IG_FLAGS, log=folder / "ig_service.log", update=update
            )
        overrides.append(f"reward.semantic.url={ig_url}")
    config = compose_config(overrides)
    figures = asyncio.run(measure(screen, config, arguments, overrides=overrides))
    screen.console.print(show(figures))
    return figures


async def measure(
    screen: Screen, config: Config, arguments: argparse.Namespace, *, overrides: Sequence[str]
) -> dict[str, object]:
    """Measure steps of search_r1, then every method on the same trajectories."""
    async with open_trainer(config) as trainer:
        parts = trainer.parts
        await parts.publisher.verify(version=0)
        parts.engines.expect_version(0)
        steps = Cost()
        with screen.phase("measuring steps", total=arguments.steps) as update:
            for step in range(1, WARM_UP_STEPS + arguments.steps + 1):
                before, began = count_processor_seconds(), time.perf_counter()
                await trainer.train_step(step)
                if step > WARM_UP_STEPS:
                    steps.add(count_processor_seconds() - before, time.perf_counter() - began)
                    update(step - WARM_UP_STEPS, f"{steps.cpu_s[-1]:.1f} processor s")
        methods = [make_method(name, trainer, overrides=overrides) for name in arguments.methods]
        batches = []
        with screen.phase("measuring methods", total=arguments.repeats) as update:
            for repeat in range(arguments.repeats):
                update(repeat, "episodes")
                batches.append(await play(trainer, number=repeat))
                for method in methods:
                    update(repeat, method.name)
                    await measure_method(method, trainer, batches[-1])
        for method in methods:
            await method.aclose()
        turns = await measure_turns(trainer)
        with screen.phase("measuring the update, the bare engine and the bare update"):
            for batch in batches:  # last: the policy is not the engine's any more
                await batch.train(trainer)
            ratios = await asyncio.to_thread(compare_bare, config, batches)
    step_cpu_s, step_s = statistics.median(steps.cpu_s), statistics.median(steps.wall_s)
    return {
        "step_cpu_s": round(step_cpu_s, 2),
        "step_s": round(step_s, 2),
        "overhead": {m.name: round(statistics.median(m.cost.cpu_s) / step_cpu_s, 3) for m in methods},
        "overhead_visible": {m.name: round(statistics.median(m.cost.wall_s) / step_s, 3) for m in methods},
        "tokens_scored_vs_naive": {
            m.name: round(m.scorer.shared / m.scorer.naive, 3)
            for m in methods
            if m.scorer is not None and m.scorer.naive
        },
        "turns": turns,
        **ratios,
        "searches_per_trajectory": round(
            statistics.fmean(len(t.observations) for batch in batches for t in batch.trajectories), 2
        ),
    }


async def play(trainer: PPOTrainer, *, number: int) -> Batch:
    """Play the episodes of a step over questions that no step before had."""
    questions = trainer.parts.questions.next_batch()
    step = trainer.total_steps + number
    began = time.perf_counter()
    groups = await trainer.parts.collector.collect(questions, step=step)
    return Batch(groups=groups, step=step, rollout_s=time.perf_counter() - began)


async def measure_method(method: Method, trainer: PPOTrainer, batch: Batch) -> None:
    """Measure what a method adds to the step that played these groups.

    A gain that the IG service computes while episodes run is invisible until they have ended: for methods
    that prefetch the episodes are played again. Where the update needs old log-probs, a method that scores
    the trajectories gives them, too: the pass that a `search_r1` step needs for them is taken off.
    """
    algorithm, scorer = method.algorithm, method.scorer
    questions = [group.question for group in batch.groups]
    collect = partial(trainer.parts.collector.collect, questions, step=batch.step)
    prefetches = type(algorithm).prefetch is not Algorithm.prefetch
    rows = build_batch(batch.trajectories, [spread(t, 0.0) for t in batch.trajectories])
    plain_cpu_s = plain_wall_s = 0.0
    before, began = count_processor_seconds(), time.perf_counter()
    if prefetches:
        await collect()
        plain_cpu_s = count_processor_seconds() - before
    elif scorer is not None and scorer.scores_trajectories:
        await trainer.parts.policy.log_probs(rows)
        plain_cpu_s, plain_wall_s = count_processor_seconds() - before, time.perf_counter() - began
    before = count_processor_seconds()
    async with aclosing(algorithm.prefetch(questions)) as prefetch:
        if prefetches:
            await collect(on_episode_end=prefetch.on_episode_end)
        began = time.perf_counter()
        await method.reward.score(batch.groups, prefetch=prefetch)
    wall_s = time.perf_counter() - began
    method.cost.add(count_processor_seconds() - before - plain_cpu_s, wall_s - plain_wall_s)


def make_method(name: str, trainer: PPOTrainer, *, overrides: Sequence[str]) -> Method:
    """Return a method with what it measures with. Raises ConfigError where the run has no such model."""
    config = compose_config([o for o in overrides if not o.startswith("algorithm=")] + [f"algorithm={name}"])
    algorithm_class = ALGORITHMS[name]
    parts = trainer.parts
    semantic = config.reward.semantic
    client = None
    if algorithm_class.needs & USE_IG_SERVICE:
        client = GainClient(semantic.url, timeout_s=semantic.timeout_s, batch_size=semantic.batch_size)
    if Need.FROZEN_LOG_PROBS in algorithm_class.needs and parts.reference is None:
        raise ConfigError(
            f"{name} is measured with the frozen reference, which actor_rollout_ref.actor.use_kl_loss=false "
            f"leaves out: set it to true, or leave {name} out of --methods"
        )
    tokenizer = HfTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
    services = make_services(
        config,
        Models(policy=parts.policy, reference=parts.reference, engines=parts.engines),
        codec=tokenizer,
        ig_client=client,
    )
    inner = services.policy or services.frozen
    scorer = None if inner is None else CountingScorer(inner)
    if scorer is not None:
        changed = {"policy": scorer} if services.policy is not None else {"frozen": scorer}
        services = replace(services, **changed)  # type: ignore[arg-type]
    algorithm = algorithm_class(config.algorithm, services)
    reward = make_reward(config, algorithm, decode=tokenizer.decode)
    return Method(name=name, algorithm=algorithm, reward=reward, scorer=scorer, client=client)


async def measure_turns(trainer: PPOTrainer) -> dict[str, dict[str, float]]:
    """Return how long scoring an answer in every state takes for trajectories of 1 to 8 turns.

    16 trajectories of 40 tokens a turn, an answer of 8 tokens; milliseconds, the best of three.
    """
    rng = np.random.default_rng(0)
    figures = {}
    for turns in SCORED_TURNS:
        trees = [
            Tree(
                trunk=rng.integers(5, 1000, 60 + 40 * turns).astype(np.int32),
                branches=tuple(
                    Branch(
                        ids=rng.integers(5, 1000, 8).astype(np.int32),
                        start=60 + 40 * turn,
                        scored=(0, 8),
                    )
                    for turn in range(turns + 1)
                ),
            )
            for _ in range(16)
        ]
        seconds = {}
        for shared in (True, False):
            times = []
            for _ in range(3):
                began = time.perf_counter()
                await trainer.parts.policy.tree_log_probs(trees, shared=shared)
                times.append(time.perf_counter() - began)
            seconds[shared] = 1000 * min(times)
        figures[str(turns)] = {
            "shared_ms": round(seconds[True], 1),
            "naive_ms": round(seconds[False], 1),
        }
    return figures


def compare_bare(config: Config, batches: Sequence[Batch]) -> dict[str, float]:
    """Return rollout and update against vLLM and torch alone, and the share of sampled tokens that count."""
    spawn = multiprocessing.get_context("spawn")
    settings = config.actor_rollout_ref
    loaded = (settings, config.data.max_model_len)
    with ProcessPoolExecutor(1, spawn, initializer=bare.load, initargs=loaded) as process:
        decode_s = sum(process.submit(bare.decode, batch.requests()).result() for batch in batches)
    with ProcessPoolExecutor(1, spawn) as process:  # vLLM leaves a process with fewer threads
        train_s = sum(
            process.submit(
                bare.train,
                [t.token_ids.tolist() for t in batch.trajectories],
                [t.policy_mask.tolist() for t in batch.trajectories],
                settings,
            ).result()
            for batch in batches
        )
    sampled = sum(t.num_policy_tokens for batch in batches for t in batch.trajectories)
    return {
        "rollout_vs_engine": round(decode_s / sum(batch.rollout_s for batch in batches), 3),
        "update_vs_torch": round(train_s / sum(batch.update_s for batch in batches), 3),
        "decoded_over_useful": round(sampled / sum(batch.num_trained for batch in batches), 3),
    }


def show(figures: dict[str, object]) -> Table:
    """Return the result for the terminal."""
    overhead, visible = figures["overhead"], figures["overhead_visible"]
    scored = figures["tokens_scored_vs_naive"]
    assert isinstance(overhead, dict)
    assert isinstance(visible, dict)
    assert isinstance(scored, dict)
    table = Table(
        "method",
        "processor time",
        "visible time",
        "tokens scored / naive",
        title=f"added to a search_r1 step of {figures['step_cpu_s']} processor s, {figures['step_s']} s",
    )
    for name in overhead:
        share = f"{scored[name]:.2f}" if name in scored else ""
        table.add_row(name, f"{overhead[name]:+.1%}", f"{visible[name]:+.1%}", share)
    return table


if __name__ == "__main__":
    with error_line():
        sys.exit(main())

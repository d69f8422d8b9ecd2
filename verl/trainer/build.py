"""Composition root, the only module that imports every package: wire the trainer's parts, take them down."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from search_r1.search.client import HttpSearch
from serving.answers import AnswerRule
from serving.machine import has_bfloat16
from verl.agent.formats import FORMATS
from verl.agent.loop import EpisodeLimits, ToolAgent
from verl.agent.prompts import load_texts, prompt_file
from verl.agent.tools import TOOLS
from verl.agent.tools.search import render_context
from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Algorithm, Need, Services, TextCodec
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.data.dataset import check_prompt_lengths, load_questions, require_supporting_ids
from verl.data.sampler import QuestionSampler
from verl.errors import ConfigError
from verl.protocols import PromptFormat, Tokenizer, Tool, ToolResources
from verl.rollout.collector import Collector
from verl.rollout.pool import EnginePool
from verl.rollout.tokenizer import HfTokenizer
from verl.run.folder import lock_folder, recorded_end, scratch_folder
from verl.run.manifest import Manifest, make_manifest, write_manifest
from verl.run.progress import Identity, Progress, run_identity
from verl.run.recorder import Recorder
from verl.run.resume import find_progress
from verl.run.tracking import Tracker, read_metrics
from verl.trainer.config.advice import list_advice
from verl.trainer.config.schema import Config, RetrieverConfig
from verl.trainer.config.validate import resolve_device, validate
from verl.trainer.launch import Models, count_gpus, count_workers, launch_models
from verl.trainer.ppo.alarms import Alarms
from verl.trainer.ppo.guard import Guard
from verl.trainer.ppo.trainer import Parts, PPOTrainer
from verl.types import Question
from verl.utils.logs import configure_logging
from verl.utils.reward_score.IG_client import GainClient
from verl.utils.shutdown import close_quietly
from verl.workers.checkpoint import CheckpointStore
from verl.workers.model import check_model, trees_score_as_rows
from verl.workers.scorer import LogProbScorer
from verl.workers.weight_sync import WeightPublisher, make_probe, probe_tolerance

logger = logging.getLogger(__name__)

USE_IG_SERVICE = frozenset({Need.IG_SERVICE, Need.ENTAILMENT})
"""Needs that the IG service meets."""
USE_LOG_PROBS = frozenset({Need.POLICY_LOG_PROBS, Need.FROZEN_LOG_PROBS})
"""Needs that a forward pass over trees meets."""


@asynccontextmanager
async def open_trainer(config: Config) -> AsyncIterator[PPOTrainer]:
    """Build what a run needs, and take it down at the end, also after a failure.

    Cheap checks come first (configuration, services, data), models load last. At the end the manifest records
    how the run ended and the report is written. Raises ConfigError, DataError, ServiceError before training.
    """
    num_gpus = count_gpus()
    validate(config, num_gpus=num_gpus, cpu_has_bfloat16=has_bfloat16())
    run_dir = Path(config.trainer.default_local_dir).resolve()
    with lock_folder(run_dir):
        configure_logging(log_file=run_dir / "train.log")
        logger.info("run folder: %s", run_dir)
        for advice in list_advice(config):
            logger.warning(advice)
        async with AsyncExitStack() as stack:
            yield await build(
                config, stack, run_dir=run_dir, device=resolve_device(config, num_gpus=num_gpus)
            )


async def build(config: Config, stack: AsyncExitStack, *, run_dir: Path, device: str) -> PPOTrainer:
    """Wire the parts; each registers on the stack how it is taken down."""
    tools = make_tools(config, ToolResources(open_search=partial(open_search, config.retriever)))
    needs = find_needs(config)
    ig_client, services = await connect_services(config, stack, tools=tools, needs=needs)
    model_folder = check_model(
        config.actor_rollout_ref.model, device=device, scores_trees=bool(needs & USE_LOG_PROBS)
    )
    tags = FORMATS[config.agent.format].tags
    tokenizer = HfTokenizer.from_pretrained(config.actor_rollout_ref.model.path, tags=tags)
    prompt_format = make_format(config, tokenizer=tokenizer, tools=tools)
    train, held_out = load_data(config, prompt_format)
    if Need.SUPPORTING_IDS in needs:
        require_supporting_ids(train, method=config.algorithm.name)
    manifest = make_manifest(
        config,
        services=services,
        model_folder=model_folder,
        prompt_file=prompt_file(config.data.prompt_file),
        prompt=tokenizer.decode(prompt_format.render_prompt(train[0])),
    )
    start = start_run(config, stack, run_dir=run_dir, device=device, questions=train, manifest=manifest)
    # Last, because it takes long: settings, services, data and the checkpoint have been checked.
    models = await start_models(config, stack, start, run_dir=run_dir, device=device)
    algorithm = ALGORITHMS[config.algorithm.name](
        config.algorithm,
        make_services(config, models, device=device, codec=tokenizer, ig_client=ig_client),
    )
    tolerance = probe_tolerance(config.actor_rollout_ref, device=device)
    parts = Parts(
        questions=start.sampler,
        held_out=held_out,
        collector=make_collector(config, engines=models.engines, prompt_format=prompt_format, tools=tools),
        algorithm=algorithm,
        reward=make_reward(config, algorithm, decode=tokenizer.decode),
        policy=models.policy,
        reference=models.reference if config.actor_rollout_ref.actor.use_kl_loss else None,
        copy=models.copy,
        engines=models.engines,
        publisher=make_publisher(
            stack, models, prompt_format=prompt_format, questions=train, tolerance=tolerance
        ),
        checkpoints=start.checkpoints,
        guard=Guard(run_dir, max_skipped_updates=config.actor_rollout_ref.actor.max_skipped_updates),
        alarms=Alarms(
            config.trainer.alarms,
            max_turns=config.max_turns,
            max_log_prob_difference=tolerance,
            history=[line for line in read_metrics(run_dir) if line["kind"] == "train"],
        ),
        tracker=make_tracker(config, stack, run_dir=run_dir, total_steps=start.total_steps),
        recorder=Recorder(run_dir, decode=tokenizer.decode),
    )
    return PPOTrainer(
        parts,
        settings=config.trainer,
        total_steps=start.total_steps,
        pad_id=tokenizer.pad_id,
        progress=start.progress,
        identity=start.identity,
    )


def find_needs(config: Config) -> frozenset[Need]:
    """Return what the method measures with; an evaluation measures no gain."""
    return frozenset() if config.trainer.evaluates_only else ALGORITHMS[config.algorithm.name].needs


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """Where a run begins: at its first step, or at a checkpoint of the run folder."""

    sampler: QuestionSampler
    total_steps: int
    identity: Identity
    progress: Progress
    checkpoints: CheckpointStore
    checkpoint: Path | None
    """The one to resume from."""


def start_run(
    config: Config,
    stack: AsyncExitStack,
    *,
    run_dir: Path,
    device: str,
    questions: Sequence[Question],
    manifest: Manifest,
) -> RunStart:
    """Find the step to begin at and write the manifest, which the stack completes. Raises ConfigError."""
    sampler = QuestionSampler(questions, batch_size=config.data.train_batch_size, seed=config.trainer.seed)
    total_steps = config.trainer.count_steps(batches_per_epoch=sampler.batches_per_epoch)
    identity = run_identity(config, manifest, num_workers=count_workers(config, device=device))
    checkpoints, progress, checkpoint = find_progress(
        config, run_dir, total_steps=total_steps, identity=identity, manifest=manifest
    )
    if checkpoint is not None:
        sampler.load_state_dict(progress.sampler)
    write_manifest(run_dir, manifest, resumed_from=progress.step or None)
    stack.enter_context(recorded_end(run_dir, progress))
    return RunStart(
        sampler=sampler,
        total_steps=total_steps,
        identity=identity,
        progress=progress,
        checkpoints=checkpoints,
        checkpoint=checkpoint,
    )


async def start_models(
    config: Config, stack: AsyncExitStack, start: RunStart, *, run_dir: Path, device: str
) -> Models:
    """Launch the models that the run needs; an evaluation needs the policy alone."""
    options = ALGORITHMS[config.algorithm.name].scorer_options(config.algorithm)
    trains = not config.trainer.evaluates_only
    refresh_steps = options.refresh_steps if trains else 0
    has_kl = trains and config.actor_rollout_ref.actor.use_kl_loss
    scores_with_reference = Need.FROZEN_LOG_PROBS in find_needs(config) and not refresh_steps
    return await launch_models(
        config,
        stack,
        device=device,
        total_steps=start.total_steps,
        scratch=stack.enter_context(scratch_folder(run_dir)),
        checkpoint=start.checkpoint,
        needs_reference=has_kl or scores_with_reference,
        refresh_steps=refresh_steps,
    )


def make_services(
    config: Config, models: Models, *, device: str, codec: TextCodec, ig_client: GainClient | None
) -> Services:
    """Hand the method what it needs to measure with."""
    needs = find_needs(config)
    shares_prefixes = ALGORITHMS[config.algorithm.name].scorer_options(config.algorithm).shares_prefixes
    policy = frozen = None
    if Need.POLICY_LOG_PROBS in needs:
        policy = LogProbScorer(
            models.policy,
            shares_prefixes=shares_prefixes,
            # The same pass gives the old log-probs, where an update needs any and would compute the same.
            scores_trajectories=not models.policy.is_on_policy_with(config.trajectories_per_step)
            and trees_score_as_rows(config.actor_rollout_ref.model, device=device),
        )
    frozen_model = models.reference if models.copy is None else models.copy.model
    if Need.FROZEN_LOG_PROBS in needs and frozen_model is not None:
        frozen = LogProbScorer(frozen_model, shares_prefixes=shares_prefixes, scores_trajectories=False)
    return Services(
        render_context=render_context,
        ig_service=ig_client if Need.IG_SERVICE in needs else None,
        codec=codec,
        policy=policy,
        frozen=frozen,
        entailment=ig_client if Need.ENTAILMENT in needs else None,
    )


def make_publisher(
    stack: AsyncExitStack,
    models: Models,
    *,
    prompt_format: PromptFormat,
    questions: Sequence[Question],
    tolerance: float,
) -> WeightPublisher:
    """Make the publisher of weights, whose probe is the beginning of the run's own prompts."""
    publisher = WeightPublisher(
        models.policy,
        models.engines.receivers,
        probe_ids=make_probe(prompt_format.render_prompt(question) for question in questions),
        tolerance=tolerance,
    )
    close_quietly(stack, publisher.close)
    return publisher


def make_tracker(config: Config, stack: AsyncExitStack, *, run_dir: Path, total_steps: int) -> Tracker:
    """Make the tracker of metrics, which is finished at the end."""
    tracker = Tracker(run_dir, config.trainer, run_config=dataclasses.asdict(config), total_steps=total_steps)
    close_quietly(stack, tracker.finish)
    return tracker


def open_search(config: RetrieverConfig) -> HttpSearch:
    """Make a client of the retriever."""
    # Tokens are secrets, so they are not part of the configuration, the manifest or a command line.
    token = os.environ.get("RETRIEVER_TOKEN") or None
    return HttpSearch(config.url, topk=config.topk, timeout_s=config.timeout_s, token=token)


def make_tools(config: Config, resources: ToolResources) -> list[Tool]:
    """Make the tools that the policy can call. Raises ConfigError for their texts in the prompt file."""
    path = prompt_file(config.data.prompt_file)
    return [
        tool(
            getattr(config, tool.section) if tool.section else None,
            texts=load_texts(path, section=f"tools.{name}", entries=tool.texts),
            resources=resources,
        )
        for name, tool in ((name, TOOLS[name]) for name in config.agent.tools)
    ]


def make_format(config: Config, *, tokenizer: Tokenizer, tools: Sequence[Tool]) -> PromptFormat:
    """Make the prompt format with the texts of the prompt file. Raises ConfigError."""
    name, path = config.agent.format, prompt_file(config.data.prompt_file)
    texts = load_texts(path, section=name, entries=FORMATS[name].texts)
    prompt_format = FORMATS[name](tokenizer=tokenizer, texts=texts, tools=[tool.spec for tool in tools])
    if problem := prompt_format.check_prompt(prompt_format.write_prompt("")):
        raise ConfigError(
            f"data.prompt_file={str(path)!r}: the instruction of {name} {problem}; add it there"
        )
    return prompt_format


def make_collector(
    config: Config, *, engines: EnginePool, prompt_format: PromptFormat, tools: Sequence[Tool]
) -> Collector:
    """Make the collector, which runs the episodes of a step."""
    rollout, data = config.actor_rollout_ref.rollout, config.data
    limits = EpisodeLimits(
        max_turns=config.max_turns,
        max_start_length=data.max_start_length,
        max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length,
        max_obs_length=data.max_obs_length,
        temperature=rollout.temperature,
    )
    agent = ToolAgent(generate=engines, prompt_format=prompt_format, tools=tools, limits=limits)
    return Collector(
        agent,
        n=rollout.n_agent,
        max_concurrent=config.trainer.max_concurrent_episodes,
        max_failure_share=config.reward.max_failure_share,
        seed=config.trainer.seed,
    )


def make_reward(config: Config, algorithm: Algorithm, *, decode: Callable[[Sequence[int]], str]) -> Reward:
    """Make the reward: the outcome of an episode, and the gains of the method.

    `decode` returns the text of sampled tokens.
    """
    reward = config.reward
    outcome = partial(
        measure_outcome,
        metric=reward.outcome,
        format_score=reward.format_score,
        rule=AnswerRule(reward.answer_rule),
        decode=decode,
    )
    fix = "repair what the failures name."
    if algorithm.needs & USE_IG_SERVICE:
        fix = f"is the IG service at {reward.semantic.url} (reward.semantic.url) up?"
    return Reward(
        outcome,
        algorithm=algorithm,
        max_failure_share=reward.max_failure_share,
        fix=fix,
    )


async def connect_services(
    config: Config, stack: AsyncExitStack, *, tools: Sequence[Tool], needs: frozenset[Need]
) -> tuple[GainClient | None, dict[str, object]]:
    """Wait for what the tools call and, if needed, the IG service; return its client and all versions."""
    for tool in tools:
        close_quietly(stack, tool.aclose)
    semantic, gains = config.reward.semantic, None
    if needs & USE_IG_SERVICE:
        token = os.environ.get("IG_TOKEN") or None
        gains = GainClient(
            semantic.url, timeout_s=semantic.timeout_s, batch_size=semantic.batch_size, token=token
        )
        close_quietly(stack, gains.aclose)
    wait_s = config.trainer.service_wait_s
    connections = [tool.connect(wait_s) for tool in tools]
    waiting = _wait_for(gains, wait_s, judges=Need.ENTAILMENT in needs)
    health, *facts = await asyncio.gather(waiting, *connections)
    names = [tool.section or tool.spec.name for tool in tools]
    services: dict[str, object] = {
        name: dict(found) for name, found in zip(names, facts, strict=True) if found
    }
    if gains is not None:
        version = await gains.describe()
        services["ig_service"] = {"url": semantic.url, "health": health, "version": version}
    return gains, services


async def _wait_for(gains: GainClient | None, timeout_s: float, *, judges: bool) -> Mapping[str, object]:
    """Return the health of the IG service once it answers, if it is needed."""
    return {} if gains is None else await gains.wait_ready(timeout_s, judges=judges)


def load_data(config: Config, prompt_format: PromptFormat) -> tuple[list[Question], list[Question]]:
    """Return training and held-out questions; none of their prompts is too long."""
    data = config.data
    train = load_questions(data.train_paths, prompt_format=prompt_format, prompt=data.prompt)
    held_out = load_questions(
        data.val_paths, prompt_format=prompt_format, prompt=data.prompt, limit=data.val_max_questions
    )
    if data.prompt_file is not None and not any(
        question.messages == prompt_format.write_prompt(question.text) for question in (*train, *held_out)
    ):
        logger.warning(
            "the instruction of data.prompt_file=%r is not used: every question has a prompt of its own; to "
            "use it set data.prompt=file",
            data.prompt_file,
        )
    check_prompt_lengths(
        [*train, *held_out], prompt_format=prompt_format, max_start_length=data.max_start_length
    )
    return train, held_out

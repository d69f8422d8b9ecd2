"""Composition root of training: wire the trainer's parts, take them down at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.machine import has_bfloat16
from verl.agent.prompts import prompt_file
from verl.agent.tools.search import render_context
from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Algorithm, Need, Services, TextCodec
from verl.algorithms.scoring.reward import Reward
from verl.data.dataset import require_supporting_ids
from verl.data.sampler import QuestionSampler
from verl.protocols import PromptFormat
from verl.rollout.collector import Collector
from verl.rollout.pool import EnginePool
from verl.run.folder import LOG_FILE, PROFILES, lock_folder, recorded_end, scratch_folder
from verl.run.manifest import Manifest, make_manifest, write_manifest
from verl.run.progress import Identity, Progress, run_identity
from verl.run.recorder import Recorder
from verl.run.records import Decode
from verl.run.resume import find_progress
from verl.run.tracking import Tracker, read_metrics
from verl.trainer.config.advice import list_advice
from verl.trainer.config.pools import transfer_kind
from verl.trainer.config.schema import SYNC, ActorRolloutRefConfig, Config
from verl.trainer.config.validate import resolve_device, validate
from verl.trainer.launch import Host, Models, count_gpus, launch_models
from verl.trainer.needs import USE_IG_SERVICE, find_needs
from verl.trainer.plan.command import check_memory, choose_gpu
from verl.trainer.plan.gpus import Gpu, measure_gpus
from verl.trainer.plan.setup import make_setup
from verl.trainer.plan.shape import UnknownShapeError, read_shape
from verl.trainer.ppo.alarms import Alarms
from verl.trainer.ppo.guard import Guard
from verl.trainer.ppo.profiler import Profiler
from verl.trainer.ppo.speed import Machine
from verl.trainer.ppo.trainer import Parts, PPOTrainer
from verl.trainer.wiring import (
    bind_agent,
    connect_grader,
    connect_services,
    load_prompts,
    make_format,
    make_outcome,
    make_resources,
    make_tokenizer,
    make_tools,
    warn_if_unused,
)
from verl.types import Question
from verl.utils.garbage import frozen_heap
from verl.utils.logs import configure_logging
from verl.utils.reward_score.IG_client import GainClient
from verl.utils.reward_score.math_grader import GradingAgent, MathGrader
from verl.utils.shutdown import close_quietly
from verl.workers.checkpoint import CheckpointStore
from verl.workers.model import check_model
from verl.workers.scorer import LogProbScorer
from verl.workers.weight_file import FileTransfer
from verl.workers.weight_ipc import IpcTransfer
from verl.workers.weight_nccl import NcclTransfer
from verl.workers.weight_sync import WeightPublisher, WeightTransfer, make_probe, probe_tolerance

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_trainer(config: Config, *, host: Host | None = None) -> AsyncIterator[PPOTrainer]:
    """Build what a run needs, and take it down at the end, also after a failure.

    Cheap checks come first (configuration, services, data), models load last. At the end the manifest records
    how the run ended and the report is written. The engines of a `host` stay; they must be those that this
    configuration would start. Raises ConfigError, DataError, ServiceError before training.
    """
    num_gpus = count_gpus()
    validate(config, num_gpus=num_gpus, cpu_has_bfloat16=has_bfloat16())
    run_dir = Path(config.trainer.default_local_dir).resolve()
    with lock_folder(run_dir):
        configure_logging(log_file=run_dir / LOG_FILE)
        logger.info("run folder: %s", run_dir)
        for advice in list_advice(config):
            logger.warning(advice)
        async with AsyncExitStack() as stack:
            trainer = await build(
                config, stack, run_dir=run_dir, device=resolve_device(config, num_gpus=num_gpus), host=host
            )
            stack.enter_context(frozen_heap())
            yield trainer


async def build(
    config: Config, stack: AsyncExitStack, *, run_dir: Path, device: str, host: Host | None = None
) -> PPOTrainer:
    """Wire the parts; each registers on the stack how it is taken down."""
    tools = make_tools(config, make_resources(config))
    needs = find_needs(config)
    ig_client, services = await connect_services(config, stack, tools=tools, needs=needs)
    grader = await connect_grader(config, stack)
    model_folder = check_model(config.actor_rollout_ref.model, device=device)
    if device == "cuda":
        check_memory(config, model_path=str(model_folder))
    tokenizer = make_tokenizer(config)
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
    start = await start_run(config, stack, run_dir=run_dir, questions=train, manifest=manifest)
    # Last, because it takes long: settings, services, data and the checkpoint have been checked.
    models = await start_models(config, stack, start, run_dir=run_dir, device=device, host=host)
    algorithm = ALGORITHMS[config.algorithm.name](
        config.algorithm,
        make_services(config, models, codec=tokenizer, ig_client=ig_client),
    )
    tolerance = probe_tolerance(config.actor_rollout_ref, device=device)
    parts = Parts(
        questions=start.sampler,
        held_out=held_out,
        collector=make_collector(config, engines=models.engines, grader=grader),
        algorithm=algorithm,
        reward=make_reward(config, algorithm, decode=tokenizer.decode, grader=grader),
        policy=models.policy,
        reference=models.reference if config.actor_rollout_ref.actor.use_kl_loss else None,
        copy=models.copy,
        engines=models.engines,
        publisher=make_publisher(
            config.actor_rollout_ref,
            models,
            device=device,
            prompt_format=prompt_format,
            questions=train,
        ),
        checkpoints=start.checkpoints,
        guard=Guard(run_dir, max_skipped_updates=config.actor_rollout_ref.actor.max_skipped_updates),
        alarms=Alarms(
            config.trainer.alarms,
            max_turns=config.max_turns,
            max_log_prob_difference=tolerance if config.trainer.schedule == SYNC else None,
            history=[line for line in read_metrics(run_dir) if line["kind"] == "train"],
        ),
        tracker=make_tracker(config, stack, run_dir=run_dir, total_steps=start.total_steps),
        recorder=Recorder(run_dir, decode=tokenizer.decode),
        machine=await describe_machine(config, models, model_folder=model_folder, device=device),
        profiler=Profiler(folder=run_dir / PROFILES, steps=frozenset(config.trainer.profile_steps)),
    )
    return PPOTrainer(
        parts,
        settings=config.trainer,
        total_steps=start.total_steps,
        progress=start.progress,
        identity=start.identity,
    )


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


async def start_run(
    config: Config,
    stack: AsyncExitStack,
    *,
    run_dir: Path,
    questions: Sequence[Question],
    manifest: Manifest,
) -> RunStart:
    """Find the step to begin at and write the manifest, which the stack completes. Raises ConfigError."""
    sampler = QuestionSampler(questions, batch_size=config.data.train_batch_size, seed=config.trainer.seed)
    total_steps = config.trainer.count_steps(batches_per_epoch=sampler.batches_per_epoch)
    identity = run_identity(config, manifest)
    checkpoints, progress, checkpoint = await asyncio.to_thread(  # hashes the files of a checkpoint
        find_progress, config, run_dir, total_steps=total_steps, identity=identity, manifest=manifest
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
    config: Config,
    stack: AsyncExitStack,
    start: RunStart,
    *,
    run_dir: Path,
    device: str,
    host: Host | None,
) -> Models:
    """Launch the models that the run needs; an evaluation needs the policy alone."""
    return await launch_models(
        config,
        stack,
        device=device,
        total_steps=start.total_steps,
        scratch=stack.enter_context(scratch_folder(run_dir)),
        checkpoint=start.checkpoint,
        open_agent=bind_agent(
            config, device=device, temperature=config.actor_rollout_ref.rollout.temperature
        ),
        host=host,
    )


async def describe_machine(config: Config, models: Models, *, model_folder: Path, device: str) -> Machine:
    """Return what the speed of a step is compared with: the shape of the model, the peaks of the GPUs."""
    # Without a kind that the plan knows, as on CPUs, no share of a peak can be measured.
    gpu: Gpu | None = None
    if device == "cuda":
        gpu = choose_gpu(config, measure_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES")))
    try:
        setup = make_setup(config, read_shape(str(model_folder)), gpu or Gpu(name=device, memory=0.0))
    except UnknownShapeError as error:
        logger.warning("the FLOP of a step are not counted: %s", error)
        setup = None
    return Machine(
        setup=setup,
        num_epochs=config.actor_rollout_ref.actor.ppo_epochs,
        publish_bytes=await models.policy.export_bytes() * len(models.engines.receivers),
    )


def make_services(
    config: Config, models: Models, *, codec: TextCodec, ig_client: GainClient | None
) -> Services:
    """Hand the method what it needs to measure with."""
    needs = find_needs(config)
    shares_prefixes = ALGORITHMS[config.algorithm.name].scorer_options(config.algorithm).shares_prefixes
    policy = frozen = None
    if Need.POLICY_LOG_PROBS in needs:
        policy = LogProbScorer(
            models.policy,
            shares_prefixes=shares_prefixes,
            # The same pass gives the old log-probs, where an update needs any.
            scores_trajectories=not models.policy.is_on_policy(config.trajectories_per_step),
        )
    frozen_model = models.reference if models.copy is None else models.copy.model
    if Need.FROZEN_LOG_PROBS in needs and frozen_model is not None:
        frozen = LogProbScorer(frozen_model, shares_prefixes=shares_prefixes, scores_trajectories=False)
    return Services(
        render_context=render_context,
        ig_service=ig_client if Need.IG_SERVICE in needs else None,
        codec=codec,
        answer_wrapper=config.reward.answer_wrapper,
        policy=policy,
        frozen=frozen,
        entailment=ig_client if Need.ENTAILMENT in needs else None,
    )


def make_publisher(
    config: ActorRolloutRefConfig,
    models: Models,
    *,
    device: str,
    prompt_format: PromptFormat,
    questions: Sequence[Question],
) -> WeightPublisher:
    """Make the publisher of weights, whose probe is the beginning of the run's own prompts."""
    policy, receivers = models.policy, models.engines.receivers
    transfer: WeightTransfer
    kind = transfer_kind(config, device=device)
    if kind == "nccl":
        size = config.rollout.tensor_model_parallel_size
        transfer = NcclTransfer(policy, receivers, engine_size=size)
    elif kind == "ipc":
        transfer = IpcTransfer(policy, receivers)
    else:
        transfer = FileTransfer(policy, receivers)
    return WeightPublisher(
        policy,
        receivers,
        transfer,
        probe_ids=make_probe(prompt_format.render_prompt(question) for question in questions),
        tolerance=probe_tolerance(config, device=device),
    )


def make_tracker(config: Config, stack: AsyncExitStack, *, run_dir: Path, total_steps: int) -> Tracker:
    """Make the tracker of metrics, which is finished at the end."""
    tracker = Tracker(run_dir, config.trainer, run_config=dataclasses.asdict(config), total_steps=total_steps)
    close_quietly(stack, tracker.finish)
    return tracker


def make_collector(config: Config, *, engines: EnginePool, grader: MathGrader | None) -> Collector:
    """Make the collector, which runs the episodes of a step."""
    return Collector(
        engines if grader is None else GradingAgent(engines, grader),
        n=config.actor_rollout_ref.rollout.n_agent,
        max_concurrent=engines.max_concurrent,
        max_failure_share=config.reward.max_failure_share,
        seed=config.trainer.seed,
    )


def load_data(config: Config, prompt_format: PromptFormat) -> tuple[list[Question], list[Question]]:
    """Return training and held-out questions; none of their prompts is too long."""
    data = config.data
    train = load_prompts(config, data.train_paths, prompt_format=prompt_format)
    held_out = load_prompts(config, data.val_paths, prompt_format=prompt_format, limit=data.val_max_questions)
    warn_if_unused(config, [*train, *held_out], prompt_format=prompt_format)
    return train, held_out


def make_reward(
    config: Config, algorithm: Algorithm, *, decode: Decode, grader: MathGrader | None = None
) -> Reward:
    """Make the reward: the outcome of an episode, and the gains of the method."""
    fix = "repair what the failures name."
    if algorithm.needs & USE_IG_SERVICE:
        fix = f"is the IG service at {config.reward.semantic.url} (reward.semantic.url) up?"
    return Reward(
        make_outcome(config, decode=decode, grader=grader),
        algorithm=algorithm,
        max_failure_share=config.reward.max_failure_share,
        fix=fix,
    )

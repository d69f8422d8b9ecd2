"""Evaluate a model without training: engines alone, the agent of the training, answers that are kept.

It ends with one record per question and sample, for any number of engines, started once or often.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from serving.evidence import find_corpus_hash
from serving.files import write_json_atomically
from serving.machine import has_bfloat16
from verl.agent.prompts import prompt_file
from verl.agent.reference import NO_SEARCH
from verl.algorithms.scoring.reward import OutcomeRule, score_answer
from verl.evaluation.audit import Audit, read_audit
from verl.evaluation.browsecomp import write_run_files
from verl.evaluation.evidence import is_complete, read_evidence, write_evidence
from verl.evaluation.loss_analysis import analyze_losses, loss_metrics
from verl.evaluation.page import write_report
from verl.evaluation.protocol_check import check_ids, check_protocol
from verl.evaluation.protocols import BROWSECOMP_PLUS
from verl.evaluation.records import METRICS_FILE, ResultWriter, read_results
from verl.evaluation.settings import open_folder
from verl.protocols import Agent
from verl.rollout.collector import Collector
from verl.run.folder import lock_folder, scratch_folder
from verl.run.manifest import make_manifest
from verl.trainer.config.schema import Config
from verl.trainer.config.validate import resolve_device, validate
from verl.trainer.launch import count_gpus, open_host
from verl.trainer.ppo.evaluation import evaluation_metrics
from verl.trainer.ppo.metrics import finite, mean
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
from verl.types import Question, Trajectory
from verl.utils.logs import ProgressLog, configure_logging
from verl.utils.reward_score.math_grader import GradingAgent
from verl.workers.checkpoint import find_policy
from verl.workers.model import check_model

logger = logging.getLogger(__name__)

LOG_FILE = "evaluation.log"


async def evaluate_model(config: Config) -> dict[str, object]:
    """Ask what is not answered yet in `evaluation.output_dir`; return the summary of all answers.

    Cheap checks come first (configuration, services, data, the folder), engines start last, and only if a
    question is left. Raises ConfigError, DataError, ServiceError before, TrainingHaltedError if too many
    fail.
    """
    model = replace(config.actor_rollout_ref.model, path=find_policy(config.actor_rollout_ref.model.path))
    config = replace(config, actor_rollout_ref=replace(config.actor_rollout_ref, model=model))
    num_gpus = count_gpus()
    validate(config, num_gpus=num_gpus, cpu_has_bfloat16=has_bfloat16(), trains=False)
    folder = Path(config.evaluation.output_dir).resolve()
    with lock_folder(folder, key="evaluation.output_dir"):
        configure_logging(log_file=Path(config.evaluation.log_file or folder / LOG_FILE))
        logger.info("evaluating %s, results in %s", model.path, folder)
        async with AsyncExitStack() as stack:
            device = resolve_device(config, num_gpus=num_gpus)
            num_asked, seconds = await answer_questions(config, stack, folder=folder, device=device)
        summary = summarize(folder, num_asked=num_asked, seconds=seconds)
        logger.info("report: %s", write_report(folder))
        if config.evaluation.protocol == BROWSECOMP_PLUS:
            logger.info("run files: %s", write_run_files(folder, read_results(folder), model=model.path))
        return summary


async def answer_questions(
    config: Config, stack: AsyncExitStack, *, folder: Path, device: str
) -> tuple[int, float]:
    """Complete the results of the folder; return the number of answers of this start and its seconds."""
    is_reference = config.evaluation.reference != "none"
    needs_tools = config.evaluation.reference != NO_SEARCH
    tools = make_tools(config, make_resources(config)) if needs_tools else []
    _, services = await connect_services(config, stack, tools=tools, needs=frozenset())
    grader = await connect_grader(config, stack)
    model_folder = check_model(config.actor_rollout_ref.model, device=device)
    tokenizer = make_tokenizer(config)
    # A reference cannot call tools: the search of one_shot_rag is not the model's.
    prompt_format = make_format(config, tokenizer=tokenizer, tools=[] if is_reference else tools)
    questions = load_prompts(
        config, config.data.val_paths, prompt_format=prompt_format, limit=config.evaluation.max_questions
    )
    warn_if_unused(config, questions, prompt_format=prompt_format)
    protocol = check_protocol(config, questions, version=find_version(services))
    audit = open_audit(config, questions, version=find_version(services))
    settings = make_manifest(
        config,
        services=services,
        model_folder=model_folder,
        prompt_file=prompt_file(config.data.prompt_file),
        prompt=tokenizer.decode(prompt_format.render_prompt(questions[0])),
        trains=False,
    )
    settings["question_ids"] = check_ids(questions, config.evaluation.expected_ids)
    settings |= {} if protocol is None else {"protocol": protocol}
    open_folder(folder, settings, resume=config.evaluation.resume)
    writer = ResultWriter(folder, decode=tokenizer.decode)
    stack.callback(writer.close)
    keys = [(question.uid, sample) for question in questions for sample in range(config.evaluation.n)]
    num_left, seconds = len(keys) - len(writer.done), 0.0
    if num_left:
        host = await open_host(
            config,
            stack,
            device=device,
            scratch=stack.enter_context(scratch_folder(folder)),
            open_agent=bind_agent(
                config,
                device=device,
                temperature=config.evaluation.temperature,
                reference=config.evaluation.reference,
            ),
            trains=False,
        )
        engines = host.engines
        agent = engines if grader is None else GradingAgent(engines, grader)
        started = time.monotonic()
        outcome = make_outcome(config, decode=tokenizer.decode, grader=grader)
        await play(
            config,
            agent,
            questions,
            max_concurrent=engines.max_concurrent,
            outcome=outcome,
            writer=writer,
        )
        seconds = time.monotonic() - started
    writer.sort(keys)
    if "search" in config.agent.tools and not is_complete(folder, read_results(folder), audit=audit):
        await trace_evidence(config, questions, folder=folder, services=services, audit=audit)
    return num_left, seconds


def open_audit(
    config: Config, questions: Sequence[Question], *, version: Mapping[str, object]
) -> Audit | None:
    """Return what the audit of evaluation.audit says of the questions; None without one. Raises DataError."""
    path = config.evaluation.audit
    if path is None:
        return None
    return read_audit(Path(path), questions, corpus_sha256=find_corpus_hash(version))


async def trace_evidence(
    config: Config,
    questions: Sequence[Question],
    *,
    folder: Path,
    services: Mapping[str, object],
    audit: Audit | None = None,
) -> None:
    """Write where the evidence for each answer was; queries are searched again, but not by online engines."""
    depth, topk = config.evaluation.search_depth, config.retriever.topk
    search = None
    version = find_version(services)
    if version.get("passages", 0) is None:
        logger.info("the queries of wrong answers are not searched again: the retriever is an online engine")
    elif depth is not None and config.evaluation.reference != NO_SEARCH:
        depth = max(depth, topk)
        deep = replace(config, retriever=replace(config.retriever, topk=depth))
        search = make_resources(deep).open_search()
    try:
        await write_evidence(
            folder,
            read_results(folder),
            questions=questions,
            search=search,
            topk=topk,
            depth=depth,
            audit=audit,
        )
    finally:
        if search is not None:
            await search.aclose()


def find_version(services: Mapping[str, object]) -> Mapping[str, object]:
    """Return how the retriever describes itself; empty where it does not."""
    found: object = services
    for name in ("retriever", "version"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


async def play(
    config: Config,
    agent: Agent,
    questions: Sequence[Question],
    *,
    max_concurrent: int,
    outcome: OutcomeRule,
    writer: ResultWriter,
) -> None:
    """Play what is not recorded, and record each trajectory as soon as its episode has ended.

    What is recorded stays, however this ends. Raises TrainingHaltedError if too many episodes fail.
    """
    evaluation, done = config.evaluation, writer.done
    collector = Collector(
        agent,
        n=evaluation.n,
        max_concurrent=max_concurrent,
        max_failure_share=config.reward.max_failure_share,
        seed=evaluation.seed,
    )

    def record(trajectory: Trajectory) -> None:
        writer.write(trajectory, score=score_answer(trajectory, outcome=outcome))

    if done:
        logger.info("%d answers are there already; the others are asked", len(done))
    try:
        await collector.answer(
            questions,
            greedy=evaluation.temperature == 0,
            done=done,
            progress=ProgressLog(logger, "answers", done=len(done)),
            on_episode_end=record,
        )
    except BaseException:  # an interrupt, too
        logger.info("%d answers are recorded; the same command asks the others", len(writer.done))
        raise


def summarize(folder: Path, *, num_asked: int, seconds: float) -> dict[str, object]:
    """Write `metrics.json` from the records; return what the last line of stdout says.

    `seconds` are those that the `num_asked` answers of this start took together.
    """
    results = read_results(folder)
    metrics = evaluation_metrics(results)
    judged = [result for result in results if result["failure"] is None]
    spent = {"perf/episode_seconds_mean": mean([result["seconds"] for result in judged])}
    evidence = read_evidence(folder, results)
    lost = loss_metrics(analyze_losses(results, evidence)) if evidence else {}
    write_json_atomically(folder / METRICS_FILE, metrics | finite(spent) | lost)
    logger.info(
        "%d answers to %d questions: %s", len(results), metrics["val/questions"], folder / METRICS_FILE
    )
    shown = ("math", "em", "sub_em", "f1", "questions", "failed", "searches_mean", "output_tokens_mean")
    return {
        **{name: metrics[f"val/{name}"] for name in shown if f"val/{name}" in metrics},
        "asked": num_asked,
        "seconds": round(seconds, 1),
        "seconds_per_question": round(seconds / num_asked, 4) if num_asked else None,
        "output_dir": str(folder),
    }

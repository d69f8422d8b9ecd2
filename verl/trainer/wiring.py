"""Wire the parts that training and evaluation share: tools, format, agent, outcome, services, questions."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial

from search_r1.search.client import HttpSearch
from serving.answers import AnswerRule
from serving.http import MAX_CONNECTIONS
from verl.agent.formats import FORMATS
from verl.agent.formats.check import check_format
from verl.agent.loop import EpisodeLimits, ToolAgent
from verl.agent.prompts import CONTEXT_TEXTS, load_texts, prompt_file
from verl.agent.reference import NO_SEARCH, ONE_SHOT_RAG, REFERENCE_TEXTS, ReferenceAgent
from verl.agent.tools import TOOLS
from verl.algorithms.base import Need
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import OutcomeRule
from verl.data.dataset import check_prompt_lengths, load_questions
from verl.errors import ConfigError
from verl.protocols import Agent, Generate, PromptFormat, Tokenizer, Tool, ToolResources
from verl.rollout.host import OpenAgent
from verl.rollout.tokenizer import HfTokenizer
from verl.run.records import Decode
from verl.trainer.config.schema import DROP_OBSERVATIONS, Config
from verl.trainer.launch import count_replicas
from verl.trainer.needs import USE_IG_SERVICE
from verl.types import Question
from verl.utils.reward_score.IG_client import GainClient
from verl.utils.reward_score.math_grader import MathGrader
from verl.utils.shutdown import close_quietly

logger = logging.getLogger(__name__)


def make_resources(config: Config, *, num_replicas: int = 1) -> ToolResources:
    """Return what the tools of each of so many engines may open: all together no more than those of one."""
    search = partial(
        HttpSearch,
        config.retriever.url,
        topk=config.retriever.topk,
        timeout_s=config.retriever.timeout_s,
        # Tokens are secrets, so they are not part of the configuration, the manifest or a command line; the
        # processes of engines do not inherit them either.
        token=os.environ.get("RETRIEVER_TOKEN") or None,
        max_connections=max(1, MAX_CONNECTIONS // num_replicas),
    )
    return ToolResources(open_search=search, num_replicas=num_replicas)


def make_tools(config: Config, resources: ToolResources) -> list[Tool]:
    """Make the tools that the policy can call. Raises ConfigError for their texts in the prompt file."""
    path = prompt_file(config.data.prompt_file)
    resources = replace(resources, tools=tuple(config.agent.tools))
    return [
        tool(
            getattr(config, tool.section) if tool.section else None,
            texts=load_texts(path, section=f"tools.{name}", entries=tool.texts),
            resources=resources,
        )
        for name, tool in ((name, TOOLS[name]) for name in config.agent.tools)
    ]


def make_tokenizer(config: Config) -> HfTokenizer:
    """Load the tokenizer of the model; tags of the format stay single tokens where it has them as such."""
    path, agent = config.actor_rollout_ref.model.path, config.agent
    tags = FORMATS[agent.format].tags
    return HfTokenizer.from_pretrained(path, tags=tags, enable_thinking=agent.enable_thinking)


def make_format(config: Config, *, tokenizer: Tokenizer, tools: Sequence[Tool]) -> PromptFormat:
    """Make the prompt format with the texts of the prompt file and try it. Raises ConfigError."""
    name, path = config.agent.format, prompt_file(config.data.prompt_file)
    texts = load_texts(path, section=name, entries=FORMATS[name].texts)
    specs = [tool.spec for tool in tools]
    prompt_format = FORMATS[name](tokenizer=tokenizer, texts=texts, tools=specs)
    if problem := prompt_format.check_prompt(prompt_format.write_prompt("")):
        raise ConfigError(
            f"data.prompt_file={str(path)!r}: the instruction of {name} {problem}; add it there"
        )
    if problem := check_format(prompt_format, tokenizer=tokenizer, tools=specs):
        model = config.actor_rollout_ref.model.path
        raise ConfigError(f"actor_rollout_ref.model.path={model!r} with agent.format={name}: {problem}")
    return prompt_format


@asynccontextmanager
async def open_agent(
    generate: Generate, *, config: Config, resources: ToolResources, temperature: float, reference: str
) -> AsyncIterator[Agent]:
    """Connect tools and make the agent that plays with an engine, or that of a reference other than "none".

    It is called in the process of the engine. Raises ServiceError, ConfigError.
    """
    async with AsyncExitStack() as stack:
        tools = [] if reference == NO_SEARCH else make_tools(config, resources)
        for tool in tools:
            close_quietly(stack, tool.aclose)
        await asyncio.gather(*(tool.connect(config.trainer.service_wait_s) for tool in tools))
        is_reference = reference != "none"
        # A reference cannot call tools: the search of one_shot_rag is not the model's.
        prompt_format = make_format(
            config, tokenizer=make_tokenizer(config), tools=[] if is_reference else tools
        )
        make: Callable[..., Agent] = make_reference if is_reference else make_agent
        yield make(
            config, generate=generate, prompt_format=prompt_format, tools=tools, temperature=temperature
        )


def bind_agent(config: Config, *, device: str, temperature: float, reference: str = "none") -> OpenAgent:
    """Return what opens the agent of each engine of a run."""
    return partial(
        open_agent,
        config=config,
        resources=make_resources(config, num_replicas=count_replicas(config, device=device)),
        temperature=temperature,
        reference=reference,
    )


def make_agent(
    config: Config,
    *,
    generate: Generate,
    prompt_format: PromptFormat,
    tools: Sequence[Tool],
    temperature: float,
) -> ToolAgent:
    """Make the agent, which plays one episode; `temperature` is that of sampled episodes."""
    dropped_text = None
    if config.agent.context == DROP_OBSERVATIONS:
        path = prompt_file(config.data.prompt_file)
        texts = load_texts(path, section="context", entries=CONTEXT_TEXTS)
        dropped_text = texts["dropped"].format()
    return ToolAgent(
        generate=generate,
        prompt_format=prompt_format,
        tools=tools,
        limits=_make_limits(config, temperature=temperature),
        dropped_text=dropped_text,
    )


def make_reference(
    config: Config,
    *,
    generate: Generate,
    prompt_format: PromptFormat,
    tools: Sequence[Tool],
    temperature: float,
) -> ReferenceAgent:
    """Make the agent of `evaluation.reference`, which asks the model once."""
    data, name = config.data, config.evaluation.reference
    texts = load_texts(prompt_file(data.prompt_file), section="references", entries=REFERENCE_TEXTS)
    # Passages are part of the first prompt.
    limits = replace(
        _make_limits(config, temperature=temperature), max_turns=0, max_start_length=data.max_prompt_length
    )
    return ReferenceAgent(
        ToolAgent(generate=generate, prompt_format=prompt_format, tools=(), limits=limits),
        prompt_format=prompt_format,
        text=texts[name],
        tool=next(t for t in tools if t.spec.name == "search") if name == ONE_SHOT_RAG else None,
        max_obs_length=data.max_obs_length,
    )


def _make_limits(config: Config, *, temperature: float) -> EpisodeLimits:
    data = config.data
    return EpisodeLimits(
        max_turns=config.max_turns,
        max_start_length=data.max_start_length,
        max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length,
        max_obs_length=data.max_obs_length,
        temperature=temperature,
    )


async def connect_grader(config: Config, stack: AsyncExitStack) -> MathGrader | None:
    """Return what grades answers to mathematical problems, if the outcome needs it. Raises ConfigError."""
    if config.reward.outcome != "math":
        return None
    grader = MathGrader(cpu_time_s=config.reward.math_cpu_time_s)
    close_quietly(stack, grader.aclose)
    await grader.connect()
    return grader


def make_outcome(config: Config, *, decode: Decode, grader: MathGrader | None = None) -> OutcomeRule:
    """Make the rule that scores the final answer of an episode; `decode` returns the text of tokens."""
    reward = config.reward
    return partial(
        measure_outcome,
        metric=reward.outcome,
        format_score=reward.format_score,
        rule=AnswerRule(reward.answer_rule),
        decode=decode,
        grade=None if grader is None else grader.grade,
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


def load_prompts(
    config: Config, files: Sequence[str], *, prompt_format: PromptFormat, limit: int | None = None
) -> list[Question]:
    """Return the questions of the files, at most `limit`; none of their prompts is too long."""
    data = config.data
    questions = load_questions(files, prompt_format=prompt_format, prompt=data.prompt, limit=limit)
    check_prompt_lengths(questions, prompt_format=prompt_format, max_start_length=data.max_start_length)
    return questions


def warn_if_unused(config: Config, questions: Sequence[Question], *, prompt_format: PromptFormat) -> None:
    """Warn if a prompt file is named and no question is asked with its instruction."""
    path = config.data.prompt_file
    if path is not None and not any(q.messages == prompt_format.write_prompt(q.text) for q in questions):
        logger.warning(
            "the instruction of data.prompt_file=%r is not used: every question has a prompt of its own; to "
            "use it set data.prompt=file",
            path,
        )

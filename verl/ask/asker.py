"""Keep an engine and the tools of an agent open, and let it answer questions one by one or at once."""

from __future__ import annotations

import asyncio
import itertools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from serving.answers import complete_question
from serving.machine import has_bfloat16
from verl.agent.loop import MAX_CHARS_PER_TOKEN, ToolAgent
from verl.algorithms.base import Need, TextCodec
from verl.ask.checkpoint import Checkpoint
from verl.ask.gains import GainMeter
from verl.ask.prompt import WritePrompt, find_prompt
from verl.ask.trace import Episode, Step, make_step
from verl.protocols import Generate, OnTurn, PromptFormat, Tool
from verl.trainer.config.schema import Config
from verl.trainer.config.validate import resolve_device, validate_episodes
from verl.trainer.launch import count_gpus, open_local_engine
from verl.trainer.wiring import (
    connect_services,
    make_agent,
    make_format,
    make_resources,
    make_tokenizer,
    make_tools,
)
from verl.types import Gain, Question, Stop, Trajectory
from verl.utils.seeding import derive_seed
from verl.utils.supervise import Supervisor, start_service
from verl.workers.model import check_model

logger = logging.getLogger(__name__)

DATA_SOURCE = "ask"
_GAIN_TIMEOUT_S = 30.0
"""For an IG service that has gone: a person waits for its gains, and has the answer."""
BY_LOG_PROB = "log_prob"
RETRIEVER_MODULE = "search_r1.search.retrieval_server"
OnStep = Callable[[Step], None]
OnEnd = Callable[[Trajectory], None]
Update = Callable[[int, str], None]
"""Called with a number and what is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an agent is made of."""

    generate: Generate
    prompt_format: PromptFormat
    tools: Sequence[Tool]
    codec: TextCodec
    write_prompt: WritePrompt
    meter: GainMeter | None = None
    """None: gains are not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskSettings:
    """How a question is asked."""

    temperature: float = 0.0
    """0: greedy, as in an evaluation."""
    max_turns: int | None = None
    """None: that of the configuration."""
    max_tokens: int | None = None
    """Of each completion; None, or more than the configuration has: that of the configuration."""
    seed: int | None = None
    """The same seed samples the same answer; None: each question has its own."""
    golds: tuple[str, ...] = ()
    """Right answers, if the user knows them: for gains only, the policy does not see them."""


GREEDY = AskSettings()


def ignore(number: int, note: str) -> None:
    """Do nothing with what is waited for."""


class Asker:
    """Answers questions with the agent of the training; a question knows nothing of those before it."""

    def __init__(self, config: Config, parts: Parts, *, stack: AsyncExitStack | None = None) -> None:
        """Take `stack`, which closes the parts."""
        self._config = config
        self._parts = parts
        self._stack = stack or AsyncExitStack()
        self._numbers = itertools.count()

    @classmethod
    async def start(
        cls,
        config: Config,
        *,
        checkpoint: Checkpoint,
        retriever: str | None,
        gains: str | None = None,
        update: Update = ignore,
    ) -> Asker:
        """Start the engine, and the retriever of the embedded world where no URL is given.

        A warning names what is not as in the run of the checkpoint. `gains`: `log_prob`, the URL of an IG
        service, or None. Raises ConfigError, DataError, ServiceError, ChildFailedError, RolloutError.
        """
        async with AsyncExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ask-")))
            num_gpus = count_gpus()
            validate_episodes(config, num_gpus=num_gpus, cpu_has_bfloat16=has_bfloat16())
            device = resolve_device(config, num_gpus=num_gpus)
            check_model(config.actor_rollout_ref.model, device=device)
            if retriever is None and "search" in config.agent.tools:
                retriever = await _start_retriever(stack, folder=scratch, update=update)
            if retriever is not None:
                config = replace(config, retriever=replace(config.retriever, url=retriever))
            if gains not in (None, BY_LOG_PROB):
                semantic = config.reward.semantic
                timeout_s = min(semantic.timeout_s, _GAIN_TIMEOUT_S)
                semantic = replace(semantic, url=gains, timeout_s=timeout_s)
                config = replace(config, reward=replace(config.reward, semantic=semantic))
            parts = await _open_parts(
                config,
                stack,
                checkpoint=checkpoint,
                device=device,
                scratch=scratch,
                gains=gains,
                update=update,
            )
            return cls(config, parts, stack=stack.pop_all())

    async def ask(
        self,
        text: str,
        *,
        settings: AskSettings = GREEDY,
        on_step: OnStep = lambda step: None,  # noqa: ARG005
        on_end: OnEnd = lambda trajectory: None,  # noqa: ARG005
    ) -> Episode:
        """Play one episode; each turn is reported when it is sampled, and again with the reply to it.

        Its end is reported before the gains are measured. A failed tool or engine is in the trajectory.
        Cancel it to stop it.
        """
        decode = self._parts.codec.decode
        trajectory = await self._play(
            text, settings, lambda number, turn: on_step(make_step(number, turn, decode=decode))
        )
        on_end(trajectory)
        gain = await self._measure(trajectory)
        gains = gain.turns or [None] * len(trajectory.turns)
        steps = [
            make_step(k, turn, decode=decode, gain=value)
            for k, (turn, value) in enumerate(zip(trajectory.turns, gains, strict=True))
        ]
        return Episode(trajectory=trajectory, steps=tuple(steps), gain=gain)

    async def _play(self, text: str, settings: AskSettings, on_turn: OnTurn) -> Trajectory:
        number = next(self._numbers)
        path = (DATA_SOURCE, number) if settings.seed is None else (DATA_SOURCE, "seed", settings.seed)
        question = self._make_question(text, number=number, golds=settings.golds)
        if (problem := self.find_problem(text)) is not None:
            return Trajectory(
                question=question,
                sample=0,
                prompt_ids=np.zeros(0, dtype=np.int32),
                turns=(),
                stop=Stop.FAILED,
                failure=problem,
            )
        return await self._agent(settings).run(
            question,
            sample=0,
            seed=derive_seed(self._config.trainer.seed, *path),
            greedy=settings.temperature == 0,
            on_turn=on_turn,
        )

    def find_problem(self, text: str) -> str | None:
        """Return why a question cannot be asked, or None: its prompt must fit `data.max_start_length`."""
        limit = self._config.data.max_start_length
        # So that a text of any length costs the same work.
        if len(text) > limit * MAX_CHARS_PER_TOKEN:
            size = f"{len(text)} characters"
        else:
            length = len(self._parts.prompt_format.render_prompt(self._make_question(text)))
            if length <= limit:
                return None
            size = f"{length} tokens with its prompt"
        return f"the question has {size}, data.max_start_length is {limit} tokens; ask a shorter one"

    @property
    def gain_unit(self) -> str | None:
        """Return what the numbers of a gain are; None where gains are not measured."""
        return None if self._parts.meter is None else self._parts.meter.unit

    async def aclose(self) -> None:
        """End the engine, the tools and the retriever that was started."""
        await self._stack.aclose()

    def _make_question(self, text: str, *, number: int = 0, golds: tuple[str, ...] = ()) -> Question:
        question = complete_question(text)
        return Question(
            uid=f"{DATA_SOURCE}/{number}",
            text=question,
            messages=self._parts.write_prompt(question),
            golds=golds,
            data_source=DATA_SOURCE,
        )

    def _agent(self, settings: AskSettings) -> ToolAgent:
        data, parts = self._config.data, self._parts
        max_tokens = min(data.max_response_length, settings.max_tokens or data.max_response_length)
        config = replace(
            self._config,
            max_turns=settings.max_turns or self._config.max_turns,
            data=replace(data, max_response_length=max_tokens),
        )
        return make_agent(
            config,
            generate=parts.generate,
            prompt_format=parts.prompt_format,
            tools=parts.tools,
            temperature=settings.temperature,
        )

    async def _measure(self, trajectory: Trajectory) -> Gain:
        """Measure the gains for the gold answers, or without any for the answer that was given."""
        golds = trajectory.question.golds or tuple(filter(None, [trajectory.answer]))
        if self._parts.meter is None or not golds:
            return Gain()
        return await self._parts.meter.measure(trajectory, golds=golds)


async def _start_retriever(stack: AsyncExitStack, *, folder: Path, update: Update) -> str:
    """Start the retriever of the embedded world; return its URL. Raises ChildFailedError."""
    supervisor = stack.enter_context(Supervisor())
    return await asyncio.to_thread(
        start_service,
        supervisor,
        "the retriever",
        module=RETRIEVER_MODULE,
        arguments=[],
        log=folder / "retriever.log",
        update=update,
    )


async def _open_parts(
    config: Config,
    stack: AsyncExitStack,
    *,
    checkpoint: Checkpoint,
    device: str,
    scratch: Path,
    gains: str | None,
    update: Update,
) -> Parts:
    """Connect the tools, compare them with those of the run, and start the engine."""
    by_service = gains not in (None, BY_LOG_PROB)
    needs = frozenset({Need.IG_SERVICE}) if by_service else frozenset()
    tools = make_tools(config, make_resources(config))
    client, services = await connect_services(config, stack, tools=tools, needs=needs)
    warn_of_other_retriever(checkpoint.retriever, services, url=config.retriever.url)
    tokenizer = make_tokenizer(config)
    prompt_format = make_format(config, tokenizer=tokenizer, tools=tools)
    write_prompt: WritePrompt = prompt_format.write_prompt
    if checkpoint.has_data:
        write_prompt = find_prompt(config.data, prompt_format=prompt_format)
    update(0, "loading the model")
    engine = await open_local_engine(config, stack, device=device, scratch=scratch)
    meter = None
    if client is not None:
        meter = GainMeter.by_service(client)
    elif gains == BY_LOG_PROB:
        meter = GainMeter.by_log_prob(engine.score, codec=tokenizer, wrapper=config.reward.answer_wrapper)
    return Parts(
        generate=engine,
        prompt_format=prompt_format,
        tools=tools,
        codec=tokenizer,
        write_prompt=write_prompt,
        meter=meter,
    )


def warn_of_other_retriever(expected: object, services: Mapping[str, object], *, url: str) -> None:
    """Warn if the retriever does not describe itself as that of the run did."""
    found = services.get("retriever")
    version = found.get("version") if isinstance(found, Mapping) else None
    if None not in (expected, version) and expected != version:
        logger.warning(
            "the run had another retriever or index than %s: its answers can differ; name its own with "
            "--retriever",
            url,
        )

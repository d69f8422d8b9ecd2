"""A tool and a prompt format are one class and one line in a table: an episode with each, made here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from tests.agents import LIMITS, make_agent
from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch, make_question, make_turn
from verl.agent.formats import FORMATS
from verl.agent.loop import EpisodeLimits, ToolAgent
from verl.agent.tools import TOOLS
from verl.errors import ConfigError, ServiceError
from verl.protocols import FixedText, Tokenizer, Tool, ToolResources
from verl.trainer import build
from verl.trainer.config.loading import compose_config
from verl.trainer.config.overrides import check_overrides
from verl.types import (
    Action,
    ActionKind,
    Message,
    Observation,
    Passage,
    Question,
    Span,
    SpanKind,
    Stop,
    ToolCall,
    ToolSpec,
    Turn,
)

CHARS = CharTokenizer()


@dataclass
class AddConfig:
    """Settings of the tool `add`: the section `add` of the configuration."""

    base: int = 10


class AddTool(Tool):
    """Adds numbers."""

    section = "add"
    settings_class = AddConfig
    spec = ToolSpec(
        name="add",
        description="add numbers",
        parameters={"numbers": "with spaces between"},
        empty_text="There are no numbers.",
    )
    closed: ClassVar[list[int]] = []

    def __init__(self, settings: AddConfig, *, texts: Mapping[str, str], resources: ToolResources) -> None:
        del texts, resources
        self._base = settings.base

    async def call(self, arguments: Mapping[str, object], *, deadline: float) -> Observation:
        del deadline
        numbers = str(arguments["numbers"]).split()
        if numbers == ["none"]:
            return Observation()
        try:
            return Observation(text=str(sum(int(number, self._base) for number in numbers)))
        except ValueError as error:
            return Observation(text=f"error: {error}")

    async def aclose(self) -> None:
        self.closed.append(self._base)


class LineFormat:
    """`!tool argument|argument` calls a tool with each argument, any other line is the answer."""

    tags: ClassVar[tuple[str, ...]] = ()
    texts: ClassVar[Mapping[str, FixedText]] = {}
    stop_strings = ("\n",)
    reply_length = 1
    max_calls = 3
    ends_when_invalid = False

    def __init__(self, *, tokenizer: Tokenizer, texts: Mapping[str, str], tools: Sequence[ToolSpec]) -> None:
        del texts
        self._tokenizer = tokenizer
        self._parameters = {tool.name: next(iter(tool.parameters)) for tool in tools}

    def write_prompt(self, question: str) -> tuple[Message, ...]:
        return (Message(role="user", content=f"{question} Tools: {', '.join(self._parameters)}\n"),)

    def check_prompt(self, messages: Sequence[Message]) -> str | None:
        return None if messages else "is empty"

    def render_prompt(self, question: Question) -> list[int]:
        return self._tokenizer.render_prompt(question)

    def write_call(self, call: ToolCall) -> str:
        (argument,) = call.arguments.values()
        return f"!{call.tool} {argument}\n"

    def parse(self, ids: Sequence[int]) -> Action:
        line = self._tokenizer.decode(ids).removesuffix("\n")
        name, _, rest = line[1:].partition(" ")
        if not line.startswith("!"):
            answer = Span(kind=SpanKind.ANSWER, start=0, end=len(line), text=line)
            return Action(kind=ActionKind.ANSWER, spans=(answer,))
        if name not in self._parameters:
            return Action(kind=ActionKind.INVALID)
        queries = list(re.finditer(r"[^|]+", line[len(line) - len(rest) :]))[: self.max_calls]
        start = len(line) - len(rest)
        return Action(
            kind=ActionKind.TOOL,
            calls=tuple(ToolCall(tool=name, arguments={self._parameters[name]: q[0]}) for q in queries),
            spans=tuple(
                Span(kind=SpanKind.QUERY, start=start + q.start(), end=start + q.end(), text=q[0])
                for q in queries
            ),
        )

    def neutralize(self, text: str) -> str:
        return text.replace("!", "?")

    def render_observations(
        self, calls: Sequence[ToolCall], observations: Sequence[Observation]
    ) -> list[int]:
        assert len(calls) == len(observations)
        return self._tokenizer.encode("".join(f"= {found.text}\n" for found in observations))

    def render_retry(self, turn: Turn) -> list[int]:
        return self._tokenizer.encode("?" if len(turn.output_ids) else "")


async def test_a_tool_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOLS, "add", AddTool)
    config = compose_config(check_overrides(["agent.tools=[add,search]", "add.base=8"]))
    search = ScriptedSearch()
    tools = build.make_tools(config, ToolResources(open_search=lambda: search))
    prompt_format = build.make_format(config, tokenizer=CHARS, tools=tools)
    script = ["<add> 7 3 </add>", "<add> 9 </add>", "<add> none </add>", "<answer> 5 </answer>"]
    generate = ScriptedGenerate([CHARS.encode(text) for text in script])
    limits = EpisodeLimits(**(LIMITS | {"max_turns": 3}), temperature=1.0)
    agent = ToolAgent(generate=generate, prompt_format=prompt_format, tools=tools, limits=limits)
    async with AsyncExitStack() as stack:
        _, services = await build.connect_services(config, stack, tools=tools, needs=frozenset())
        trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert (trajectory.stop, trajectory.answer) == (Stop.ANSWERED, "5")
    assert [observation.text for observation in trajectory.observations] == [
        "10",
        "error: invalid literal for int() with base 8: '9'",
        "",
    ]
    read = CHARS.decode(trajectory.turns[2].observation_ids.tolist())
    assert read == "\n\n<information>There are no numbers.</information>\n\n"
    assert generate.samplings[0].stop == ("</add>", "</search>", "</answer>")
    listed = (
        "<add> numbers </add>: add numbers\n"
        "<search> query </search>: search for passages that help to answer the question\n"
    )
    assert listed in prompt_format.write_prompt("Who?")[0].content
    assert listed in CHARS.decode(prompt_format.render_retry(make_turn(ActionKind.INVALID)))
    assert (search.num_waits, search.num_closes, AddTool.closed) == (1, 1, [8])
    assert list(services) == ["retriever"]


async def test_only_listed_tools_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOLS, "add", AddTool)
    config = compose_config(check_overrides(["agent.tools=[add]"]))

    def open_search() -> ScriptedSearch:
        raise AssertionError("no listed tool searches")

    tools = build.make_tools(config, ToolResources(open_search=open_search))
    assert [tool.spec.name for tool in tools] == ["add"]
    with pytest.raises(ConfigError, match=r"add\.bas"):
        compose_config(check_overrides(["agent.tools=[add]", "add.bas=8"]))


async def test_a_format_is_one_class_with_several_calls_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "lines", LineFormat)
    lines = ("!search bolton|leeds\n", "!x\n", "Bolton\n")
    generate = ScriptedGenerate([CHARS.encode(line) for line in lines])
    bolton = Passage(id="1", title='"Bolton!"', text="A town.", score=1.0)
    leeds = Passage(id="2", title="", text="city " * 50, score=1.0)
    search = ScriptedSearch({"bolton": (bolton,), "leeds": (leeds,)})
    agent = make_agent(generate, search, tokenizer=CHARS, name="lines", max_obs_length=100)
    trajectory = await agent.run(make_question(text="Where?"), sample=0, seed=0, greedy=False)
    first = trajectory.turns[0]
    # Each result has passages of its own; the longest is cut first.
    found = [observation.passages for observation in first.observations]
    assert found[0] == (replace(bolton, title='"Bolton?"'),)
    assert [passage.id for passage in found[1]] == ["2"]
    assert 0 < len(found[1][0].text) < len(leeds.text)
    assert first.observation_truncated
    assert 98 <= len(first.observation_ids) <= 100
    shown = "".join(f"= {observation.text}\n" for observation in first.observations)
    assert CHARS.decode(trajectory.token_ids.tolist()) == f"Where?!search bolton|leeds\n{shown}!x\n?Bolton\n"
    assert [CHARS.decode(first.output_ids[s.start : s.end].tolist()) for s in first.action.spans] == [
        "bolton",
        "leeds",
    ]
    assert (search.queries, first.action.text) == (["bolton", "leeds"], "bolton\nleeds")
    assert (trajectory.answer, trajectory.passages) == ("Bolton", (*found[0], *found[1]))


async def test_one_failed_call_fails_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "lines", LineFormat)
    generate = ScriptedGenerate([CHARS.encode("!search bolton|leeds\n")])
    search = ScriptedSearch({"leeds": ServiceError("retriever", "down")})
    agent = make_agent(generate, search, tokenizer=CHARS, name="lines")
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert (trajectory.failure, trajectory.observations) == ("search_failed: retriever: down", ())


def test_agent_imports_without_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "import verl.agent.loop, verl.agent.formats, verl.agent.tools, verl.agent.prompts\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'httpx', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

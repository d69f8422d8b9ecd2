"""A tool and a prompt format are one class and one line in a table: an episode with each, made here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest

from tests.agents import make_agent
from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch, make_question
from verl.agent.formats import FORMATS
from verl.agent.tools import TOOLS
from verl.protocols import FixedText, Tokenizer, ToolResources
from verl.types import Action, ActionKind, Message, Observation, Passage, Question, Stop, ToolSpec, Turn

CHARS = CharTokenizer()


class AddTool:
    """Adds numbers."""

    spec = ToolSpec(name="add", description="add numbers", parameters={"numbers": "with spaces between"})

    def __init__(self, resources: ToolResources) -> None:
        del resources

    async def call(self, arguments: Mapping[str, object], *, deadline: float) -> Observation:
        del deadline
        try:
            return Observation(text=str(sum(map(int, str(arguments["numbers"]).split()))))
        except ValueError as error:
            return Observation(text=f"error: {error}")

    def shorten(self, observation: Observation, max_chars: int) -> Observation:
        return replace(observation, text=observation.text[:max_chars])


class LineFormat:
    """`!tool argument` calls a tool, any other line is the answer."""

    tags: ClassVar[tuple[str, ...]] = ()
    texts: ClassVar[Mapping[str, FixedText]] = {}
    stop_strings = ("\n",)
    reply_length = 1

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

    def parse(self, ids: Sequence[int]) -> Action:
        line = self._tokenizer.decode(ids).removesuffix("\n")
        name, _, argument = line[1:].partition(" ")
        if not line.startswith("!"):
            return Action(kind=ActionKind.ANSWER, text=line, end=len(line))
        if name not in self._parameters:
            return Action(kind=ActionKind.INVALID)
        arguments = {self._parameters[name]: argument}
        start = len(line) - len(argument)
        return Action(
            kind=ActionKind.TOOL, text=argument, start=start, end=len(line), tool=name, arguments=arguments
        )

    def neutralize(self, text: str) -> str:
        return text.replace("!", "?")

    def render_observation(self, observation: Observation) -> list[int]:
        return self._tokenizer.encode(f"= {observation.text}\n")

    def render_retry(self, turn: Turn) -> list[int]:
        return self._tokenizer.encode("?" if len(turn.output_ids) else "")


async def test_a_tool_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOLS, "add", AddTool)
    script = [
        "<add> 2 3 </add>",
        "<add> two </add>",
        "<search> 5 </search>",
        "<answer> 5 </answer>",
    ]
    generate = ScriptedGenerate([CHARS.encode(text) for text in script])
    agent = make_agent(generate, ScriptedSearch(), tokenizer=CHARS, tools=("search", "add"), max_turns=3)
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert (trajectory.stop, trajectory.answer) == (Stop.ANSWERED, "5")
    assert [turn.action.tool for turn in trajectory.tool_turns] == ["add", "add", "search"]
    assert [turn.observation.text for turn in trajectory.tool_turns if turn.observation] == [
        "5",
        "error: invalid literal for int() with base 10: 'two'",
        "",
    ]
    assert generate.samplings[0].stop == ("</search>", "</add>", "</answer>")


async def test_a_format_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "lines", LineFormat)
    generate = ScriptedGenerate([CHARS.encode(text) for text in ("!search bolton\n", "!x\n", "Bolton\n")])
    page = Passage(id="1", title='"Bolton!"', text="A town.", score=1.0)
    agent = make_agent(generate, ScriptedSearch({"bolton": (page,)}), tokenizer=CHARS, name="lines")
    trajectory = await agent.run(make_question(text="Where?"), sample=0, seed=0, greedy=False)
    assert CHARS.decode(trajectory.token_ids.tolist()) == (
        'Where?!search bolton\n= Doc 1(Title: "Bolton?") A town.\n!x\n?Bolton\n'
    )
    first = trajectory.turns[0]
    assert CHARS.decode(first.output_ids[first.action.start : first.action.end].tolist()) == "bolton"
    assert (trajectory.answer, trajectory.passages) == ("Bolton", (replace(page, title='"Bolton?"'),))


def test_agent_imports_without_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "import verl.agent.loop, verl.agent.formats, verl.agent.tools, verl.agent.prompts\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'httpx', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

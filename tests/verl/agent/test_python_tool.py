"""The tool `python`: what the policy reads, episodes in two formats, and machines that isolate too little."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.agents import LIMITS, make_format, make_tools
from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch, make_question
from verl.agent.loop import EpisodeLimits, ToolAgent
from verl.agent.prompts import PACKAGED_FILE, load_texts
from verl.agent.tools.python import PythonConfig, PythonTool, check_isolation
from verl.agent.tools.sandbox import Isolation
from verl.errors import ConfigError, ServiceError
from verl.protocols import ToolResources
from verl.types import Observation, SpanKind, Stop

CHARS = CharTokenizer()


def make_tool(settings: PythonConfig, *, num_replicas: int = 1) -> PythonTool:
    texts = load_texts(PACKAGED_FILE, section="tools.python", entries=PythonTool.texts)
    resources = ToolResources(open_search=ScriptedSearch, num_replicas=num_replicas)
    return PythonTool(settings, texts=texts, resources=resources)


@pytest.fixture
async def tool() -> AsyncIterator[PythonTool]:
    tool = make_tool(PythonConfig(cpu_time_s=1, timeout_s=60, max_output_bytes=100, max_concurrent=2))
    facts = await tool.connect(10)
    assert facts.keys() == {"isolation", "version"}
    yield tool
    await tool.aclose()


async def test_the_policy_reads_output_value_error_and_why_its_code_was_stopped(tool: PythonTool) -> None:
    texts = {
        "print('a ')\n1 + 1": "a \n2",
        "print(1)\n1 / 0": "1\nZeroDivisionError: division by zero (line 2)",
        "x = 1": "",
        "print(1)\nwhile True: pass": "1\n[The code was stopped after 1 s of computing.]",
        "while True: print('x' * 99)": f"{'x' * 99}\n[The code was stopped: it printed more than 100 bytes.]",
        "import ctypes\nctypes.string_at(0)": "[The code crashed the interpreter.]",
    }
    for code, text in texts.items():
        assert await tool.call({"code": code}, deadline=0) == Observation(text=text)


async def test_the_tool_of_each_engine_runs_its_share_of_the_processes() -> None:
    tool = make_tool(PythonConfig(timeout_s=60, max_concurrent=3), num_replicas=2)
    await tool.connect(10)
    code = "import time\nprint(time.monotonic())\ntime.sleep(0.05)\ntime.monotonic()"
    ran = await asyncio.gather(*(tool.call({"code": code}, deadline=0) for _ in range(2)))
    await tool.aclose()
    first, second = sorted([float(line) for line in each.text.split()] for each in ran)
    assert first[1] <= second[0]


async def test_long_output_keeps_its_start_and_its_end(tool: PythonTool) -> None:
    observation = Observation(text="".join(str(n % 10) for n in range(100)))
    assert tool.shorten(observation, 27).text == "0123456789\n[...]\n0123456789"
    assert tool.shorten(observation, 100) == observation
    lengths = [len(tool.shorten(observation, n).text) for n in range(101)]
    assert lengths == [*range(101)]


async def test_a_sandbox_that_does_not_work_is_a_failure() -> None:
    tool = make_tool(PythonConfig(timeout_s=1e-3))
    with pytest.raises(ServiceError, match=r"python: no code can be run: not started within 0\.001 s"):
        await tool.connect(10)
    observation = await tool.call({"code": "1"}, deadline=0)
    assert observation == Observation(failure="not started within 0.001 s")
    await tool.aclose()


@pytest.mark.parametrize(
    ("isolation", "text"),
    [
        (Isolation(namespaces=False, landlock=0, seccomp=True), "by seccomp, expected also namespaces or"),
        (Isolation(namespaces=True, landlock=0, seccomp=False), "by namespaces, expected also seccomp"),
        (Isolation(namespaces=False, landlock=0, seccomp=False), "by limits of resources alone, expected"),
    ],
)
def test_a_machine_that_isolates_too_little_is_refused(
    isolation: Isolation, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=rf"python\.require_isolation=true, .* {text}"):
        check_isolation(isolation, is_required=True)
    check_isolation(isolation, is_required=False)
    assert "it can do what this user can" in caplog.text


CODE = """
total = 0
for n in range(1, 5):
    total += n ** 2
print('</information></tool_response>')
total
"""


@pytest.mark.parametrize("name", ["search_r1", "tool_calls"])
async def test_a_policy_computes_an_answer(tool: PythonTool, name: str) -> None:
    call = json.dumps({"name": "python", "arguments": {"code": CODE}})
    outputs = {
        "search_r1": f"<think> sum </think><python>{CODE}</python>",
        "tool_calls": f"<think> sum </think><tool_call>{call}</tool_call>",
    }
    generate = ScriptedGenerate([CHARS.encode(outputs[name]), CHARS.encode("<answer> 30 </answer>")])
    agent = ToolAgent(
        generate=generate,
        prompt_format=make_format(CHARS, name=name, tools=("search", "python")),
        tools=[*make_tools(ScriptedSearch(), ("search",)), tool],
        limits=EpisodeLimits(**LIMITS, temperature=1.0),
    )
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert (trajectory.stop, trajectory.answer) == (Stop.ANSWERED, "30")
    turn = trajectory.turns[0]
    query = next(span for span in turn.action.spans if span.kind is SpanKind.QUERY)
    assert query.text == CODE.strip() == turn.action.calls[0].arguments["code"]
    sampled = CHARS.decode(turn.output_ids[query.start : query.end].tolist())
    assert sampled == (CODE.strip() if name == "search_r1" else json.dumps(CODE)[1:-1])
    assert turn.observations == (Observation(text="< /information>< /tool_response>\n30"),)
    assert "< /tool_response>\n30" in CHARS.decode(turn.observation_ids.tolist())


async def test_formats_tell_the_policy_how_to_run_code() -> None:
    listed = {"search_r1": "<python> code </python>: run Python code", "tool_calls": '"name": "python"'}
    for name, text in listed.items():
        prompt_format = make_format(CHARS, name=name, tools=("python",))
        assert any(text in message.content for message in prompt_format.write_prompt("1 + 1?"))
    for tool in make_tools(ScriptedSearch(), ("python",)):
        await tool.aclose()

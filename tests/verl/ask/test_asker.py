"""Questions to scripted engines: what is reported, measured and shown."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from tests.agents import make_format
from tests.fakes import ScriptedSearch
from tests.verl.ask.asking import CHARS, SCRIPT, make_asker, make_config
from verl.ask.asker import Asker, AskSettings, warn_of_other_retriever
from verl.ask.gains import GainMeter
from verl.ask.openai_wire import Writer
from verl.ask.terminal import TerminalView
from verl.ask.trace import Step, episode_record
from verl.errors import RolloutError, ServiceError
from verl.types import FloatArray, IntArray, Passage, Stop


async def show(asker: Asker, question: str = "Where was he born", **settings: object) -> str:
    """Return what the terminal shows of an episode."""
    screen = io.StringIO()
    view = TerminalView(Console(file=screen, width=200))
    view.begin(question)
    episode = await asker.ask(question, settings=AskSettings(**settings), on_step=view.show, on_end=view.end)
    view.sum_up(episode, gain_unit=asker.gain_unit)
    return screen.getvalue()


async def test_a_question_gets_the_instruction_of_the_format_and_each_turn_is_reported_twice() -> None:
    asker, generate = make_asker()
    reported: list[Step] = []
    episode = await asker.ask(" Where was he born", on_step=reported.append)
    prompt = make_format(CHARS).write_prompt("Where was he born?")[0].content
    assert generate.contexts[0] == CHARS.encode(prompt)
    assert {sampling.temperature for sampling in generate.samplings} == {0.0}
    assert [step["turn"] for step in reported] == [0, 0, 1]
    first, second, last = reported
    assert (first["kind"], first["parts"]) == ("tool", [{"kind": "think", "text": "I need it."}])
    assert first["calls"] == [
        {"tool": "search", "arguments": {"query": "Gilbert Nash"}, "passages": None, "text": None}
    ]
    assert [passage["id"] for passage in second["calls"][0]["passages"] or ()] == ["637"]
    assert episode.steps == (second, last)
    record = episode_record(episode, gain_unit=asker.gain_unit)
    assert (record["answer"], record["stop"], record["gain_unit"]) == ("Harwick", "answered", None)
    assert record["usage"]["completion_tokens"] == sum(map(len, SCRIPT))
    assert record["usage"]["total_tokens"] == len(record["token_ids"])


LONG = {name: (Passage(id=name, title="T", text=name * 500, score=0.8),) for name in "ab"}
SEARCHES = ("<search>a</search>", "<search>b</search>", SCRIPT[1])


def make_small_asker(context: str, *, room: int) -> Asker:
    """An asker with so much room besides the prompt of `q`."""
    config = make_config()
    config.agent.context = context
    length = len(make_format(CHARS).write_prompt("q?")[0].content)
    config.data.max_start_length, config.data.max_prompt_length = length, length + room
    return make_asker(SEARCHES, search=ScriptedSearch(dict(LONG)), config=config)[0]


async def test_a_result_that_was_not_read_is_not_shown() -> None:
    asker = make_small_asker("end", room=900)
    read, unread = (await asker.ask("q")).steps
    assert [passage["id"] for passage in read["calls"][0]["passages"] or ()] == ["a"]
    assert (unread["calls"][0]["passages"], unread["calls"][0]["text"]) == (None, None)
    assert unread["note"] is not None
    shown = await show(make_small_asker("end", room=900), "q")
    assert ("bbb" in shown, "nothing was found" in shown, "had no room" in shown) == (False, False, True)


async def test_a_step_names_what_later_turns_read_instead_of_its_result() -> None:
    first, second, last = (await make_small_asker("drop_observations", room=900).ask("q")).steps
    assert [step["num_dropped"] for step in (first, second, last)] == [0, 0, 1]
    assert "<information>" in CHARS.decode(first["replacement_ids"])
    assert second["replacement_ids"] == []


async def test_a_question_without_room_fails_with_what_to_do() -> None:
    asker, generate = make_asker()
    shown = await show(asker, "x" * 3000)
    assert "data.max_start_length is 3000 tokens; ask a shorter one" in shown
    record = episode_record(await asker.ask("x" * 60000), gain_unit=None)
    assert (record["stop"], record["token_ids"], generate.contexts) == ("failed", [], [])


async def test_the_answer_does_not_wait_for_its_gains() -> None:
    events: list[str] = []

    async def score_late(ids: IntArray) -> FloatArray:
        events.append("measured")
        return await score(ids)

    asker, _ = make_asker(meter=GainMeter.by_log_prob(score_late, codec=CHARS, wrapper="auto"))
    await asker.ask("q", on_end=lambda trajectory: events.append(str(trajectory.answer)))
    assert events[:2] == ["Harwick", "measured"]


async def test_settings_of_a_question_hold_for_it_alone() -> None:
    asker, generate = make_asker([SCRIPT[0], "<search>x</search>", *SCRIPT])
    settings = AskSettings(temperature=0.5, max_turns=1, max_tokens=50)
    assert (await asker.ask("q", settings=settings)).trajectory.stop is Stop.BUDGET
    assert {(s.temperature, s.max_tokens) for s in generate.samplings} == {(0.5, 50)}
    assert (await asker.ask("q", settings=AskSettings(max_tokens=999))).trajectory.stop is Stop.ANSWERED
    assert {(s.temperature, s.max_tokens) for s in generate.samplings[2:]} == {(0.0, 200)}
    assert generate.samplings[0].seed != generate.samplings[-1].seed


async def score(ids: IntArray) -> FloatArray:
    """An answer is more likely where a passage names it."""
    return np.full(len(ids), -1.0 if CHARS.decode(ids.tolist()).count("Harwick") > 1 else -3.0, np.float32)


async def test_gains_are_those_of_the_own_answer_or_of_one_that_the_user_knows() -> None:
    meter = GainMeter.by_log_prob(score, codec=CHARS, wrapper="auto")
    shown = await show(make_asker(meter=meter)[0])
    assert "gain +2.000  turn 1  Gilbert Nash" in shown
    assert "towards its own answer, in log-prob" in shown
    shown = await show(make_asker(meter=meter)[0], golds=("Bolton",))
    assert "gain +0.000  turn 1" in shown
    assert "towards the right answer" in shown


async def test_gains_that_cannot_be_measured_are_no_numbers() -> None:
    async def fail(_: IntArray) -> FloatArray:
        raise RolloutError("engine-0 is gone")

    shown = await show(make_asker(meter=GainMeter.by_log_prob(fail, codec=CHARS, wrapper="auto"))[0])
    assert "gain: not measured: gain_failed: engine-0 is gone" in shown
    failed = await make_asker(meter=GainMeter.by_log_prob(fail, codec=CHARS, wrapper="auto"))[0].ask("q")
    writer = Writer("policy")
    for part in (
        writer.completion(failed)["choices"][0]["message"],
        writer.end(failed)[-1]["choices"][0]["delta"],
    ):
        assert part["search_gain_failure"] == "gain_failed: engine-0 is gone"
    without = make_asker(
        ["<search>x</search>"] * 4, meter=GainMeter.by_log_prob(score, codec=CHARS, wrapper="auto")
    )[0]
    assert "gain: nothing to measure" in await show(without)


@pytest.mark.parametrize(
    ("outputs", "search", "lines"),
    [
        (SCRIPT, None, ["I need it.", "search: Gilbert Nash", '0.700  "Gilbert Nash"', "1 call, 84 tokens"]),
        (["hm", SCRIPT[1]], None, ["hm", "My previous action is invalid", "Harwick"]),
        (["<search>x</search>"] * 4, None, ["nothing was found", "no answer within the turns"]),
        (["<answer></answer>"], None, ["(an empty answer)"]),
        ([RolloutError("gone")], None, ["failed: generation_failed: gone"]),
        (
            SCRIPT,
            ScriptedSearch({"Gilbert Nash": ServiceError("retriever", "down")}),
            ["search: Gilbert Nash", "failed: search_failed: retriever"],
        ),
        (["<think>\x1b[2J</think><answer>a\x07b</answer>"], None, ["\ufffd[2J", "a\ufffdb"]),
    ],
)  # fmt: skip
async def test_the_terminal_shows_what_happened(
    outputs: list[str | Exception], search: ScriptedSearch | None, lines: list[str]
) -> None:
    shown = await show(make_asker(outputs, search=search)[0])
    assert [line for line in lines if line not in shown] == [], shown


def test_another_retriever_than_that_of_the_run_is_named(caplog: pytest.LogCaptureFixture) -> None:
    services = {"retriever": {"url": "u", "version": {"index": "a"}}}
    for expected, warnings in (({"index": "a"}, 0), (None, 0), ({"index": "b"}, 1)):
        warn_of_other_retriever(expected, services, url="http://r")
        assert sum("another retriever or index than http://r" in text for text in caplog.messages) == warnings

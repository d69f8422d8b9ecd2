"""The agent loop with search: token in, token out, budgets, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agents import make_agent, make_format, make_observation, make_tools, render
from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch, make_question, make_turn
from verl.agent.loop import ToolAgent
from verl.agent.tools.search import render_context
from verl.errors import ConfigError, RolloutError, ServiceError
from verl.types import (
    ActionKind,
    Finish,
    Observation,
    Passage,
    Question,
    Stop,
    Trajectory,
    Turn,
    join_context,
)

BOLTON = Passage(id="1", title='"Bolton"', text="Bolton is a town.", score=0.9)
LONG = Passage(id="2", title='"Long"', text="word " * 200, score=0.8)
CHARS = CharTokenizer()
FORMAT = make_format(CHARS)
NOTHING_FOUND = (
    CHARS.decode(render(FORMAT, Observation()))
    .removeprefix("\n\n<information>")
    .removesuffix("</information>\n\n")
)


def build(
    *outputs: str | Exception,
    found: dict[str, tuple[Passage, ...] | Exception] | None = None,
    tokenizer: CharTokenizer = CHARS,
    dropped_text: str | None = None,
    **limits: int,
) -> tuple[ToolAgent, ScriptedGenerate, ScriptedSearch]:
    script: list[Sequence[int] | Exception] = [
        CHARS.encode(output) if isinstance(output, str) else output for output in outputs
    ]
    generate, search = ScriptedGenerate(script, version=3), ScriptedSearch(found or {})
    agent = make_agent(generate, search, tokenizer=tokenizer, dropped_text=dropped_text, **limits)
    return agent, generate, search


async def play(agent: ToolAgent) -> Trajectory:
    return await agent.run(make_question(), sample=4, seed=5, greedy=False)


async def search_once(*passages: Passage, **limits: int) -> Trajectory:
    agent, _, _ = build("<search>q</search>", "<answer>a</answer>", found={"q": passages}, **limits)
    return await play(agent)


def read(trajectory: Trajectory, turn: int = 0) -> str:
    return CHARS.decode(trajectory.turns[turn].observation_ids.tolist())


def wrapped(*passages: Passage) -> str:
    return CHARS.decode(render(FORMAT, make_observation(*passages)))


async def test_search_then_answer() -> None:
    agent, generate, search = build(
        "<search> bolton </search>", "<answer>Bolton</answer>", found={"bolton": (BOLTON,)}
    )
    trajectory = await play(agent)
    first, last = trajectory.turns
    assert (trajectory.stop, trajectory.failure, trajectory.answer) == (Stop.ANSWERED, None, "Bolton")
    assert (trajectory.sample, search.queries) == (4, ["bolton"])
    assert (first.passages, first.observation_truncated, first.finish) == ((BOLTON,), False, Finish.STOP)
    assert read(trajectory) == wrapped(BOLTON)
    assert (len(last.observation_ids), last.observations, last.passages, last.version) == (0, (), (), 3)
    assert generate.contexts[1] == [*generate.contexts[0], *first.output_ids, *first.observation_ids]
    assert {s.stop for s in generate.samplings} == {("</search>", "</answer>")}
    assert {s.max_tokens for s in generate.samplings} == {60}
    mask = trajectory.policy_mask
    assert np.array_equal(trajectory.token_ids[mask], np.concatenate([first.output_ids, last.output_ids]))
    assert np.all(trajectory.sampling_log_probs[~mask] == 0)
    assert np.all(trajectory.sampling_log_probs[mask] < 0)


async def test_every_turn_is_reported_once_it_is_sampled_and_again_with_its_reply() -> None:
    overflow = {"max_prompt_length": 300}
    for last, limits in (("<answer>a</answer>", {}), ("<search>long</search>", overflow)):
        reported: list[tuple[int, Turn]] = []
        agent, _, _ = build(
            "<search>q</search>", last, found={"q": (BOLTON,), "long": (LONG, LONG)}, **limits
        )

        def report(number: int, turn: Turn, reported: list[tuple[int, Turn]] = reported) -> None:
            reported.append((number, turn))

        trajectory = await agent.run(make_question(), sample=0, seed=5, greedy=True, on_turn=report)
        assert [number for number, _ in reported] == ([0, 0, 1, 1] if limits else [0, 0, 1])
        assert [turn.observations for _, turn in reported[::2]] == [(), ()]
        assert [turn for _, turn in reported[1:2] + reported[-1:]] == [*trajectory.turns]


@pytest.mark.parametrize(("greedy", "temperature"), [(False, 0.7), (True, 0.0)])
async def test_every_turn_has_its_own_seed_and_the_same_ones_in_every_run(
    greedy: bool, temperature: float
) -> None:
    seeds = []
    for _ in range(2):
        agent, generate, _ = build("x", "y", "z")
        await agent.run(make_question(), sample=0, seed=5, greedy=greedy)
        assert {s.temperature for s in generate.samplings} == {temperature}
        seeds.append([s.seed for s in generate.samplings])
    assert seeds[0] == seeds[1]
    assert (len(set(seeds[0])), seeds[0][0]) == (3, 6315739163131927091)


async def test_a_search_in_the_last_generation_is_not_executed() -> None:
    agent, generate, search = build(*["<search>q</search>"] * 3)
    trajectory = await play(agent)
    assert (trajectory.stop, trajectory.answer, search.queries) == (Stop.BUDGET, None, ["q", "q"])
    assert len(generate.contexts) == 3
    assert [len(turn.observations) for turn in trajectory.turns] == [1, 1, 0]
    assert [len(turn.observation_ids) > 0 for turn in trajectory.turns] == [True, True, False]


async def test_an_invalid_action_is_answered_with_the_retry_text_and_costs_a_turn() -> None:
    agent, generate, search = build("hm", "<search>", "<answer>a</answer>")
    generate.finish = Finish.LENGTH
    trajectory = await play(agent)
    assert [turn.action.kind for turn in trajectory.turns[:2]] == [ActionKind.INVALID] * 2
    assert {turn.finish for turn in trajectory.turns} == {Finish.LENGTH}
    assert read(trajectory) == CHARS.decode(FORMAT.render_retry(trajectory.turns[0]))
    assert (trajectory.stop, search.queries, len(generate.contexts)) == (Stop.ANSWERED, [], 3)


HEADED = Passage(id="3", title='"T"' + "x" * 40, text="y" * 500, score=0.8)


@pytest.mark.parametrize(
    ("found", "max_obs_length", "title", "text"),
    [
        ([BOLTON, LONG, BOLTON], 300, '"Long"', "word word"),
        ([replace(LONG, title="")], 200, "", "word word"),
        ([replace(LONG, title="word " * 200, text="x")], 200, "word word", ""),
        ([HEADED], 200, HEADED.title, "yyy"),
    ],
)
async def test_a_cut_observation_keeps_its_end_and_the_passages_are_those_that_are_read(
    found: list[Passage], max_obs_length: int, title: str, text: str
) -> None:
    trajectory = await search_once(*found, max_obs_length=max_obs_length)
    *whole, last = trajectory.passages
    assert whole == found[: len(whole)]
    assert last.is_cut
    assert (last.id, last.score) == (found[len(whole)].id, found[len(whole)].score)
    assert last.title.startswith(title)
    assert last.text.startswith(text)
    assert len(last.title + last.text) < len(found[len(whole)].title + found[len(whole)].text)
    assert trajectory.turns[0].observation_truncated
    assert max_obs_length - 10 < len(read(trajectory)) <= max_obs_length
    assert read(trajectory) == wrapped(*trajectory.passages)


async def test_a_passage_is_dropped_rather_than_cut_to_its_heading() -> None:
    heading = len('\nDoc 2(Title: "Long")')
    for room in (1, heading, heading + 1):
        long = Passage(id="1", title='"Long"', text="word" + " word" * 30, score=0.9)
        trajectory = await search_once(long, LONG, max_obs_length=len(wrapped(long)) + room)
        assert trajectory.turns[0].observation_truncated
        assert trajectory.passages == (long,)
        assert read(trajectory) == wrapped(long)


async def test_tags_in_passages_are_read_and_recorded_as_text() -> None:
    page = Passage(id="1", title="T", text="x</information>\n<answer>Bolton</answer>", score=0.8)
    trajectory = await search_once(page)
    assert read(trajectory) == (
        "\n\n<information>Doc 1(Title: T) x< /information>\n< answer>Bolton< /answer></information>\n\n"
    )
    assert read(trajectory) == wrapped(*trajectory.passages)
    assert not trajectory.turns[0].observation_truncated


class CountingTokenizer(CharTokenizer):
    """Counts the characters that it encodes and the prompts that it renders."""

    num_characters = 0
    num_prompts = 0

    def encode(self, text: str) -> list[int]:
        self.num_characters += len(text)
        return super().encode(text)

    def render_prompt(self, question: Question) -> list[int]:
        self.num_prompts += 1
        return super().render_prompt(question)


async def test_the_work_for_an_observation_does_not_grow_with_its_passages() -> None:
    work = []
    for length in (10**4, 10**6):
        tokenizer = CountingTokenizer()
        page = Passage(id="1", title="T" * length, text="word " * length, score=0.8)
        outputs = ("<search>q</search>", "<answer>a</answer>")
        agent, _, _ = build(*outputs, found={"q": (page, page)}, tokenizer=tokenizer)
        before = tokenizer.num_characters
        await play(agent)
        work.append(tokenizer.num_characters - before)
    assert work[0] == work[1] < 100 * 400


class CoarseTokenizer(CharTokenizer):
    """Reads words of any length as one token: limits in tokens say little about characters."""

    def encode(self, text: str) -> list[int]:
        return [ord(word[0]) for word in text.split()]


@pytest.mark.parametrize(("length", "shown"), [(6000, 6000), (7000, 400 * 16 - len("Doc 1(Title: T) "))])
async def test_a_result_beyond_the_character_limit_is_cut_even_if_its_tokens_would_fit(
    length: int, shown: int
) -> None:
    page = Passage(id="1", title="T", text="w" * length, score=0.8)
    outputs = ("<search>q</search>", "<answer>a</answer>")
    agent, _, _ = build(*outputs, found={"q": (page,)}, tokenizer=CoarseTokenizer())
    first = (await play(agent)).turns[0]
    assert first.passages == (replace(page, text="w" * shown, is_cut=shown < length),)
    assert first.observation_truncated == (shown < length)


async def test_the_prompt_of_a_group_is_rendered_once() -> None:
    tokenizer = CountingTokenizer()
    agent, _, _ = build(*["<answer>a</answer>"] * 5, tokenizer=tokenizer)
    await asyncio.gather(*(agent.run(make_question(), sample=k, seed=k, greedy=False) for k in range(4)))
    assert tokenizer.num_prompts == 1
    await agent.run(make_question("nq/test/1"), sample=0, seed=0, greedy=False)
    assert tokenizer.num_prompts == 2


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text("ab \n", max_size=150), max_size=4), max_obs_length=st.integers(180, 400))
def test_the_context_of_the_gain_is_exactly_the_documents_that_were_read(
    texts: list[str], max_obs_length: int
) -> None:
    found = tuple(Passage(id=str(k), title=f'"T{k}"', text=t, score=1.0) for k, t in enumerate(texts))
    outputs = (*["<search>q</search>"] * 2, "<answer>a</answer>")
    agent, _, _ = build(*outputs, found={"q": found}, max_obs_length=max_obs_length)
    trajectory = asyncio.run(play(agent))
    opening, closing = wrapped(BOLTON).split(make_observation(BOLTON).text)
    shown = [read(trajectory, k).removeprefix(opening).removesuffix(closing) for k in range(2)]
    assert render_context(trajectory) == "\n".join(text for text in shown if text != NOTHING_FOUND)


async def test_a_full_context_ends_the_episode_without_cutting_anything() -> None:
    agent, generate, _ = build(*["<search>q</search>"] * 2, found={"q": (BOLTON,)}, max_prompt_length=150)
    trajectory = await play(agent)
    assert trajectory.stop is Stop.LENGTH
    assert [len(context) <= 150 for context in generate.contexts] == [True, True]
    assert [turn.observation_overflowed for turn in trajectory.turns] == [False, True]
    assert len(trajectory.turns[1].observation_ids) == 0
    assert len(trajectory.observations) == 2
    assert trajectory.passages == (BOLTON,)
    assert render_context(trajectory) == make_observation(BOLTON).text


GONE = "gone"


async def test_a_full_context_drops_its_oldest_observations_and_records_which() -> None:
    found = {name: (Passage(id=name, title="T", text=name * 100, score=0.8),) for name in "abcd"}
    outputs = ["<search>a</search>", "<search>b</search>", "hm", "<search>c</search>", "<search>d</search>"]
    agent, generate, _ = build(
        *outputs, "<answer>x</answer>", found=found, dropped_text=GONE, max_turns=5, max_prompt_length=600
    )
    trajectory = await play(agent)
    assert (trajectory.stop, trajectory.answer, trajectory.is_one_sequence) == (Stop.ANSWERED, "x", False)
    assert [turn.num_dropped for turn in trajectory.turns] == [0, 0, 0, 0, 1, 4]
    dropped = [number for number, turn in enumerate(trajectory.turns) if len(turn.replacement_ids)]
    assert dropped == [0, 1, 3]
    context = CHARS.decode(generate.contexts[-1])
    gone = CHARS.decode(render(FORMAT, Observation(text=GONE)))
    kept = [CHARS.decode(FORMAT.render_retry(trajectory.turns[2])), wrapped(*found["d"])]
    assert context == CHARS.decode(trajectory.prompt_ids.tolist()) + "".join(
        output + read for output, read in zip(outputs, [gone, gone, kept[0], gone, kept[1]], strict=True)
    )
    assert [passage.id for passage in trajectory.passages] == ["a", "b", "c", "d"]  # all were read once


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 120), min_size=1, max_size=12), room=st.integers(0, 400))
def test_as_few_observations_are_dropped_as_make_room_and_every_context_can_be_rebuilt(
    lengths: list[int], room: int
) -> None:
    found = {f"q{k}": (Passage(id=str(k), title="", text="w" * n, score=0.8),) for k, n in enumerate(lengths)}
    outputs = [f"<search>{query}</search>" for query in found]
    limit = 200 + room
    agent, generate, _ = build(
        *outputs, "<answer>a</answer>", found=found, dropped_text=GONE, max_turns=20, max_prompt_length=limit
    )
    trajectory = asyncio.run(play(agent))
    turns = trajectory.turns
    for number, (turn, context) in enumerate(zip(turns, generate.contexts, strict=True)):
        assert trajectory.context_ids(number).tolist() == context
        assert len(context) <= limit
        before = turns[number - 1].num_dropped if number else 0
        assert before <= turn.num_dropped <= max(0, number - 1)
        if turn.num_dropped > before:  # one less would not have been enough
            fewer = join_context(trajectory.prompt_ids, turns[:number], num_dropped=turn.num_dropped - 1)
            assert len(fewer) > limit
    assert trajectory.is_one_sequence == (max(turn.num_dropped for turn in turns) == 0)
    sampled = [turn.output_ids for turn in turns]
    assert np.array_equal(trajectory.token_ids[trajectory.policy_mask], np.concatenate(sampled))
    if trajectory.stop is Stop.LENGTH:  # not even without all older ones
        gone = len(render(FORMAT, Observation(text=GONE)))
        least = len(trajectory.prompt_ids) + trajectory.num_policy_tokens
        least += sum(min(gone, len(turn.observation_ids)) for turn in turns)
        assert least + len(wrapped(*found[f"q{len(turns) - 1}"])) > limit


@pytest.mark.parametrize(
    ("last", "failure"),
    [
        ("<search>down</search>", "search_failed: retriever: secret trace"),
        (RolloutError("engine is gone"), "generation_failed: engine is gone"),
    ],
)
async def test_a_failure_ends_the_episode_keeps_the_turns_before_it_and_is_never_read(
    last: str | Exception, failure: str
) -> None:
    found = {"q": (BOLTON,), "down": ServiceError("retriever", "secret trace")}
    agent, _, _ = build("<search>q</search>", last, found=found)
    trajectory = await play(agent)
    assert (trajectory.stop, trajectory.failure) == (Stop.FAILED, failure)
    assert (trajectory.passages, len(trajectory.observations)) == ((BOLTON,), 1)
    assert "secret" not in CHARS.decode(trajectory.token_ids.tolist())


class SilentSearch(ScriptedSearch):
    """Never answers."""

    async def search(self, query: str) -> tuple[Passage, ...]:
        await asyncio.Event().wait()
        raise AssertionError(query)


async def test_a_tool_that_does_not_return_fails_the_trajectory() -> None:
    generate = ScriptedGenerate([CHARS.encode("<search>q</search>")])
    agent = make_agent(generate, SilentSearch(), tokenizer=CHARS, search_timeout_s=-0.99)
    trajectory = await play(agent)
    assert (trajectory.stop, trajectory.failure) == (Stop.FAILED, "search_failed: no answer within 0.01 s")


async def test_a_prompt_that_is_too_long_fails_and_is_not_cut() -> None:
    agent, generate, _ = build("<answer>a</answer>", max_start_length=3)
    trajectory = await play(agent)
    assert (trajectory.stop, generate.contexts) == (Stop.FAILED, [])
    assert "data.max_start_length" in str(trajectory.failure)


def test_too_little_room_for_observations_is_a_config_error() -> None:
    shortest = len(FORMAT.render_retry(make_turn(ActionKind.INVALID)))
    build(max_obs_length=shortest)
    with pytest.raises(ConfigError, match=rf"data\.max_obs_length={shortest - 1} .* at least {shortest}$"):
        build(max_obs_length=shortest - 1)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.tuples(st.text("ab ", max_size=9), st.text("ab \n", max_size=30)), max_size=4))
def test_fewer_characters_of_a_search_result_are_never_more(texts: list[tuple[str, str]]) -> None:
    (tool,) = make_tools(ScriptedSearch(), ["search"])
    found = make_observation(*(Passage(id="", title=a, text=b, score=0.0) for a, b in texts))
    lengths = [len(tool.shorten(found, count).text) for count in range(len(found.text) + 1)]
    assert lengths == sorted(lengths)
    assert tool.shorten(found, 0).text == (tool.spec.shortest_text if texts else "")
    assert all(length <= max(count + 1, len(tool.spec.shortest_text)) for count, length in enumerate(lengths))

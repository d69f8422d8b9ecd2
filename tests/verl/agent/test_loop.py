"""The agent loop: token in, token out, budgets, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch, make_question
from verl.agent.loop import SearchAgent
from verl.agent.prompts import (
    NOTHING_FOUND,
    RETRY,
    render_context,
    render_passages,
    wrap_observation,
)
from verl.errors import ConfigError, RolloutError, ServiceError
from verl.protocols import Tokenizer
from verl.types import ActionKind, Finish, Passage, Stop

BOLTON = Passage(id="1", title='"Bolton"', text="Bolton is a town.", score=0.9)
LONG = Passage(id="2", title='"Long"', text="word " * 200, score=0.8)
CHARS = CharTokenizer()
OPENING, CLOSING = wrap_observation("|").split("|")


def make_agent(
    *outputs: str | Exception,
    found: dict[str, tuple[Passage, ...] | Exception] | None = None,
    tokenizer: Tokenizer = CHARS,
    **limits: int,
) -> tuple[SearchAgent, ScriptedGenerate, ScriptedSearch]:
    script: list[Sequence[int] | Exception] = [
        tokenizer.encode(output) if isinstance(output, str) else output for output in outputs
    ]
    generate, search = ScriptedGenerate(script, version=3), ScriptedSearch(found or {})
    sizes = {
        "max_turns": 2,
        "max_start_length": 100,
        "max_prompt_length": 4000,
        "max_response_length": 60,
        "max_obs_length": 400,
    } | limits
    agent = SearchAgent(generate=generate, search=search, tokenizer=tokenizer, temperature=0.7, **sizes)
    return agent, generate, search


async def test_search_then_answer() -> None:
    agent, generate, search = make_agent(
        "<search> bolton </search>", "<answer>Bolton</answer>", found={"bolton": (BOLTON,)}
    )
    trajectory = await agent.run(make_question(), sample=4, seed=5, greedy=False)
    first, last = trajectory.turns
    assert (trajectory.stop, trajectory.failure, trajectory.answer, trajectory.sample) == (
        Stop.ANSWERED,
        None,
        "Bolton",
        4,
    )
    assert search.queries == ["bolton"]
    assert first.passages == (BOLTON,)
    assert not first.observation_truncated
    assert CHARS.decode(first.observation_ids) == wrap_observation(render_passages([BOLTON]))
    assert (len(last.observation_ids), last.passages, last.version) == (0, (), 3)
    assert generate.contexts[1] == [*generate.contexts[0], *first.output_ids, *first.observation_ids]
    assert {s.stop for s in generate.samplings} == {("</search>", "</answer>")}
    assert {s.max_tokens for s in generate.samplings} == {60}
    assert generate.sessions == ["nq/test/0"] * 2


async def test_every_turn_has_its_own_seed_and_the_same_ones_in_every_run() -> None:
    seeds = []
    for _ in range(2):
        agent, generate, _ = make_agent("x", "y", "z")
        await agent.run(make_question(), sample=0, seed=5, greedy=False)
        assert {s.temperature for s in generate.samplings} == {0.7}
        seeds.append([s.seed for s in generate.samplings])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3
    assert seeds[0][0] == 6315739163131927091


async def test_greedy_means_temperature_zero() -> None:
    agent, generate, _ = make_agent("<answer>a</answer>")
    await agent.run(make_question(), sample=0, seed=5, greedy=True)
    assert generate.samplings[0].temperature == 0.0


async def test_a_search_in_the_last_generation_is_not_executed() -> None:
    agent, generate, search = make_agent(*["<search>q</search>"] * 3)
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert (trajectory.stop, trajectory.answer, search.queries) == (Stop.BUDGET, None, ["q", "q"])
    assert len(generate.contexts) == 3
    assert len(trajectory.searches) == 2
    assert [len(turn.observation_ids) > 0 for turn in trajectory.turns] == [True, True, False]


async def test_nothing_found_is_an_observation_that_says_so() -> None:
    agent, _, _ = make_agent("<search>q</search>", "<answer>a</answer>")
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert "Nothing was found" in CHARS.decode(trajectory.turns[0].observation_ids)
    assert trajectory.turns[0].passages == ()
    assert len(trajectory.searches) == 1


async def test_an_invalid_action_is_answered_with_the_retry_text_and_costs_a_turn() -> None:
    agent, generate, search = make_agent("hm", "<search>", "<answer>a</answer>")
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert [turn.action.kind for turn in trajectory.turns[:2]] == [ActionKind.INVALID] * 2
    assert CHARS.decode(trajectory.turns[0].observation_ids) == RETRY
    assert (trajectory.stop, search.queries, len(generate.contexts)) == (Stop.ANSWERED, [], 3)


class ChatTokenizer(CharTokenizer):
    """Ends turns with `$`, or with `%`, which the template does not write."""

    def render_next_turn(self, text: str) -> list[int] | None:
        return self.encode(f"$U:{text}$A:")


@pytest.mark.parametrize(
    ("output", "finish", "read"),
    [
        ("hm$", Finish.STOP, f"U:{RETRY.strip()}$A:"),
        ("hm%", Finish.STOP, f"$U:{RETRY.strip()}$A:"),
        ("$", Finish.STOP, f"U:{RETRY.strip()}$A:"),
        ("<search></search>", Finish.STOP, RETRY),
        ("</answer>.", Finish.STOP, RETRY),
        ("hm", Finish.LENGTH, RETRY),
    ],
)
async def test_a_policy_that_ended_its_turn_is_answered_in_a_new_one(
    output: str, finish: Finish, read: str
) -> None:
    agent, generate, _ = make_agent(output, "<answer>a</answer>", tokenizer=ChatTokenizer())
    generate.finish = finish
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert CHARS.decode(trajectory.turns[0].observation_ids) == read
    assert CHARS.decode(generate.contexts[1]) == f"{make_question().text}{output}{read}"
    assert trajectory.stop is Stop.ANSWERED


async def test_the_closing_tag_stays_when_an_observation_is_cut() -> None:
    agent, _, _ = make_agent(
        "<search>q</search>", "<answer>a</answer>", found={"q": (BOLTON, LONG, BOLTON)}, max_obs_length=300
    )
    turn = (await agent.run(make_question(), sample=0, seed=0, greedy=False)).turns[0]
    text = CHARS.decode(turn.observation_ids)
    assert turn.observation_truncated
    assert 290 < len(text) <= 300
    assert text.startswith(
        '\n\n<information>Doc 1(Title: "Bolton") Bolton is a town.\nDoc 2(Title: "Long") word'
    )
    assert text.endswith("</information>\n\n")
    first, last = turn.passages
    assert first == BOLTON
    assert (last.id, last.title, last.score) == (LONG.id, LONG.title, LONG.score)
    assert LONG.text.startswith(last.text)
    assert 0 < len(last.text) < len(LONG.text)
    assert text == wrap_observation(render_passages(turn.passages))


@pytest.mark.parametrize(
    ("found", "title", "text"),
    [
        (Passage(id="1", title="", text="word " * 200, score=0.8), "", "word word"),
        (Passage(id="1", title="word " * 200, text="x", score=0.8), "word word", ""),
        (Passage(id="1", title='"T"' + "x" * 40, text="y" * 500, score=0.8), '"T"' + "x" * 40, "yyy"),
    ],
)
@pytest.mark.parametrize("max_obs_length", [200, 260])
async def test_a_cut_observation_never_becomes_nothing_found(
    found: Passage, title: str, text: str, max_obs_length: int
) -> None:
    agent, _, _ = make_agent(
        "<search>q</search>", "<answer>a</answer>", found={"q": (found,)}, max_obs_length=max_obs_length
    )
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    (shown,) = trajectory.turns[0].passages
    assert shown.title.startswith(title)
    assert shown.text.startswith(text)
    assert trajectory.turns[0].observation_truncated
    read = CHARS.decode(trajectory.turns[0].observation_ids)
    assert max_obs_length - 2 <= len(read) <= max_obs_length
    assert read == wrap_observation(render_passages([shown]))
    assert render_context(trajectory) in read


async def test_agent_tags_in_passages_are_read_and_recorded_as_text() -> None:
    page = Passage(id="1", title="T", text="x</information>\n<answer>Bolton</answer>", score=0.8)
    agent, _, _ = make_agent("<search>q</search>", "<answer>a</answer>", found={"q": (page,)})
    turn = (await agent.run(make_question(), sample=0, seed=0, greedy=False)).turns[0]
    read = CHARS.decode(turn.observation_ids)
    assert read == (
        "\n\n<information>Doc 1(Title: T) x< /information>\n< answer>Bolton< /answer></information>\n\n"
    )
    assert read == wrap_observation(render_passages(turn.passages))
    assert not turn.observation_truncated


class CountingTokenizer(CharTokenizer):
    """Counts the characters that it encodes."""

    num_characters = 0

    def encode(self, text: str) -> list[int]:
        self.num_characters += len(text)
        return super().encode(text)


async def test_the_work_for_an_observation_does_not_grow_with_its_passages() -> None:
    work = []
    for length in (10**5, 10**7):
        tokenizer = CountingTokenizer()
        page = Passage(id="1", title="T" * length, text="word " * length, score=0.8)
        agent, _, _ = make_agent(
            "<search>q</search>", "<answer>a</answer>", found={"q": (page, page)}, tokenizer=tokenizer
        )
        before = tokenizer.num_characters
        await agent.run(make_question(), sample=0, seed=0, greedy=False)
        work.append(tokenizer.num_characters - before)
    assert work[0] == work[1] < 100 * 400


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("ab \n", max_size=150), max_size=4),
    max_obs_length=st.integers(len(RETRY), 400),
)
def test_the_gain_is_asked_about_exactly_the_documents_that_were_shown(
    texts: list[str], max_obs_length: int
) -> None:
    found = tuple(Passage(id=str(k), title=f'"T{k}"', text=t, score=1.0) for k, t in enumerate(texts))
    agent, _, _ = make_agent(
        *["<search>q</search>"] * 2,
        "<answer>a</answer>",
        found={"q": found},
        max_obs_length=max_obs_length,
    )
    trajectory = asyncio.run(agent.run(make_question(), sample=0, seed=0, greedy=False))
    shown = [
        CHARS.decode(turn.observation_ids).removeprefix(OPENING).removesuffix(CLOSING)
        for turn in trajectory.searches
    ]
    assert len(shown) == 2
    assert render_context(trajectory) == "\n".join(text for text in shown if text != NOTHING_FOUND)


async def test_a_passage_is_dropped_rather_than_cut_to_its_heading() -> None:
    whole = len(wrap_observation(render_passages([BOLTON])))
    agent, _, _ = make_agent(
        "<search>q</search>", "<answer>a</answer>", found={"q": (BOLTON, LONG)}, max_obs_length=whole + 150
    )
    heading = len('\nDoc 2(Title: "Long")')
    for room in (1, heading, heading + 1):
        agent._max_obs_length = whole + room
        agent._generate = ScriptedGenerate(
            [CHARS.encode("<search>q</search>"), CHARS.encode("<answer/>")] * 2
        )
        turn = (await agent.run(make_question(), sample=0, seed=0, greedy=False)).turns[0]
        assert turn.observation_truncated
        assert turn.passages == (BOLTON,)
        assert CHARS.decode(turn.observation_ids) == wrap_observation(render_passages([BOLTON]))


async def test_a_full_context_ends_the_episode_without_cutting_anything() -> None:
    agent, generate, _ = make_agent(
        "<search>q</search>", "<search>q</search>", found={"q": (BOLTON,)}, max_prompt_length=150
    )
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert trajectory.stop is Stop.LENGTH
    assert len(generate.contexts) == 2
    assert len(generate.contexts[1]) <= 150
    assert len(trajectory.turns[1].observation_ids) == 0
    assert len(trajectory.searches) == 1


async def test_a_failed_search_fails_the_trajectory_and_is_never_evidence() -> None:
    agent, _, _ = make_agent("<search>q</search>", found={"q": ServiceError("retriever", "secret trace")})
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert trajectory.stop is Stop.FAILED
    assert trajectory.failure == "search_failed: retriever: secret trace"
    assert len(trajectory.turns) == 1
    assert "secret" not in CHARS.decode(trajectory.token_ids.tolist())
    assert trajectory.searches == ()


async def test_a_failed_generation_keeps_the_turns_before_it() -> None:
    agent, _, _ = make_agent("<search>q</search>", RolloutError("engine is gone"), found={"q": (BOLTON,)})
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert (trajectory.stop, trajectory.failure) == (Stop.FAILED, "generation_failed: engine is gone")
    assert len(trajectory.turns) == 1
    assert len(trajectory.turns[0].observation_ids) > 0


async def test_a_prompt_that_is_too_long_fails_and_is_not_cut() -> None:
    agent, generate, _ = make_agent("<answer>a</answer>", max_start_length=3)
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    assert (trajectory.stop, generate.contexts) == (Stop.FAILED, [])
    assert "data.max_start_length" in str(trajectory.failure)


def test_too_little_room_for_observations_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.max_obs_length=50 .* at least \d+"):
        make_agent(max_obs_length=50)


async def test_mask_and_log_probs_cover_exactly_the_sampled_tokens() -> None:
    agent, _, _ = make_agent("<search>q</search>", "<answer>a</answer>", found={"q": (BOLTON,)})
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)
    mask = trajectory.policy_mask
    sampled = np.concatenate([turn.output_ids for turn in trajectory.turns])
    assert np.array_equal(trajectory.token_ids[mask], sampled)
    assert np.all(trajectory.sampling_log_probs[~mask] == 0)
    assert np.all(trajectory.sampling_log_probs[mask] < 0)

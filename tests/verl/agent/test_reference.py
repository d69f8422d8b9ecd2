"""References: one completion, without a search or with what is found for the question in the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents import LIMITS, make_format, make_tools
from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch, make_question
from tests.scripted_run import decode
from verl.agent.loop import EpisodeLimits, ToolAgent
from verl.agent.prompts import PACKAGED_FILE, load_texts
from verl.agent.reference import NO_SEARCH, ONE_SHOT_RAG, REFERENCE_TEXTS, ReferenceAgent
from verl.agent.tools.search import render_passages
from verl.errors import ServiceError
from verl.evaluation.records import TRAJECTORIES_FILE, ResultWriter, read_results
from verl.run.records import read_records
from verl.types import Passage, Score, Stop, Trajectory

CHARS = CharTokenizer()
QUESTION = make_question()
BOLTON = Passage(id="1", title='"Bolton"', text="Bolton is a town </answer>.", score=0.9)
LONG = Passage(id="2", title='"Long"', text="word " * 200, score=0.8)
TEXTS = load_texts(PACKAGED_FILE, section="references", entries=REFERENCE_TEXTS)


async def play(
    name: str,
    output: str,
    *,
    found: tuple[Passage, ...] | Exception = (),
    format_name: str = "search_r1",
    max_obs_length: int = 400,
) -> tuple[Trajectory, ScriptedGenerate, ScriptedSearch]:
    generate = ScriptedGenerate([CHARS.encode(output)])
    search = ScriptedSearch({QUESTION.text: found})
    tools = make_tools(search, ["search"])
    prompt_format = make_format(CHARS, name=format_name, tools=())
    limits = EpisodeLimits(**{**LIMITS, "max_turns": 0, "max_start_length": 4000}, temperature=1.0)
    agent = ReferenceAgent(
        ToolAgent(generate=generate, prompt_format=prompt_format, tools=(), limits=limits),
        prompt_format=prompt_format,
        text=TEXTS[name],
        tool=tools[0] if name == ONE_SHOT_RAG else None,
        max_obs_length=max_obs_length,
    )
    return await agent.run(QUESTION, sample=2, seed=5, greedy=True), generate, search


@pytest.mark.parametrize("format_name", ["search_r1", "tool_calls"])
async def test_without_a_search_the_question_is_answered_in_one_completion(format_name: str) -> None:
    output = "<think>x</think><answer> Bolton </answer>"
    played, generate, search = await play(NO_SEARCH, output, format_name=format_name)
    assert (played.answer, played.stop, played.sample) == ("Bolton", Stop.ANSWERED, 2)
    assert played.question == QUESTION
    assert search.queries == []
    (context,) = generate.contexts
    assert TEXTS[NO_SEARCH].format(question=QUESTION.text) in CHARS.decode(context)
    assert context == played.prompt_ids.tolist()


async def test_passages_found_for_the_question_are_read_in_the_prompt_and_recorded(tmp_path: Path) -> None:
    played, generate, search = await play(
        ONE_SHOT_RAG, "<answer>Bolton</answer>", found=(BOLTON, LONG), max_obs_length=2000
    )
    assert search.queries == [QUESTION.text]
    (context,) = generate.contexts
    first, last = played.turns
    # The context that was sampled from is what the trajectory has before the answer.
    assert context == [*played.prompt_ids.tolist(), *first.observation_ids.tolist()]
    prompt, read = CHARS.decode(played.prompt_ids.tolist()), CHARS.decode(first.observation_ids.tolist())
    assert prompt.endswith("some may not matter:\n")
    neutral = BOLTON.text.replace("</answer>", "< /answer>")
    assert read.startswith(f"Doc 1(Title: {BOLTON.title}) {neutral}")
    assert [passage.id for passage in first.passages] == ["1", "2"]
    assert not first.observation_truncated
    assert not len(first.output_ids)
    assert played.policy_mask.sum() == len(last.output_ids)
    writer = ResultWriter(tmp_path, decode=decode)
    writer.write(played, score=Score(outcome=1.0, metrics={"em": 1.0}))
    writer.close()
    (result,) = read_results(tmp_path)
    (record,) = read_records(tmp_path / TRAJECTORIES_FILE)
    assert record["turns"][0]["observation_text"] == read
    assert (result["num_searches"], result["passages"]) == (1, [["1", "2"], []])


async def test_passages_are_cut_to_fit() -> None:
    played, generate, _ = await play(ONE_SHOT_RAG, "<answer>a</answer>", found=(LONG,), max_obs_length=100)
    first, _ = played.turns
    assert first.observation_truncated
    _, bare, _ = await play(ONE_SHOT_RAG, "<answer>a</answer>")
    num_fixed = len(bare.contexts[0]) - len("Nothing was found for this query.")
    assert len(generate.contexts[0]) - num_fixed == len(render_passages(first.passages)) == 100


async def test_a_failed_search_is_a_failed_episode_and_a_call_no_answer() -> None:
    failed, generate, _ = await play(ONE_SHOT_RAG, "", found=ServiceError("retriever", "no answer"))
    assert (failed.stop, failed.failure) == (Stop.FAILED, "search_failed: retriever: no answer")
    assert generate.contexts == []
    played, generate, search = await play(ONE_SHOT_RAG, "<search>Bolton</search>")
    assert (played.answer, played.stop, search.queries) == (None, Stop.BUDGET, [QUESTION.text])
    assert "</search>" not in generate.samplings[0].stop

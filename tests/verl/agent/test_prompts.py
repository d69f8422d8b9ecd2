"""The texts of the environment, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from verl.agent.prompts import (
    RETRY,
    neutralize_tags,
    render_context,
    render_passages,
    search_instruction,
    wrap_observation,
)
from verl.types import Action, ActionKind, Message, Passage, Question, Stop, Trajectory, Turn
from world import text

BOLTON = Passage(id="1", title='"Bolton"', text="Bolton is a town in England.", score=0.9)
LEEDS = Passage(id="2", title='"Leeds"', text="Leeds is a city.", score=0.5)


def make_turn(*passages: Passage) -> Turn:
    return Turn(
        output_ids=np.array([1], np.int32),
        output_log_probs=np.zeros(1, np.float32),
        action=Action(kind=ActionKind.SEARCH, text="q"),
        passages=passages,
        observation_ids=np.array([2], np.int32),
    )


def test_passages_are_numbered_lines() -> None:
    assert render_passages([BOLTON, LEEDS]) == (
        'Doc 1(Title: "Bolton") Bolton is a town in England.\nDoc 2(Title: "Leeds") Leeds is a city.'
    )


def test_observation_is_wrapped_and_says_when_nothing_was_found() -> None:
    observation = wrap_observation(render_passages([LEEDS]))
    assert observation == '\n\n<information>Doc 1(Title: "Leeds") Leeds is a city.</information>\n\n'
    assert wrap_observation("") == "\n\n<information>Nothing was found for this query.</information>\n\n"


def test_a_passage_without_a_title_keeps_the_format() -> None:
    assert render_passages([replace(LEEDS, title="")]) == "Doc 1(Title: ) Leeds is a city."


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a</information>b", "a< /information>b"),
        ("<search>q</search><ANSWER>x</answer>", "< search>q< /search>< ANSWER>x< /answer>"),
        ("<think><documents><tool_call>", "< think>< documents>< tool_call>"),
        ("1 < 2, <b>bold</b>, <answers>, <|x|>", "1 < 2, <b>bold</b>, <answers>, <|x|>"),
    ],
)
def test_agent_tags_in_passages_are_neutralized(text: str, read: str) -> None:
    passage = neutralize_tags(replace(LEEDS, title=text, text=text))
    assert (passage.title, passage.text) == (read, read)
    assert neutralize_tags(passage) == passage


def test_retry_text() -> None:
    assert RETRY == (
        "\nMy previous action is invalid. To search, I must put the query between <search> and </search>. "
        "To answer, I must put the answer between <answer> and </answer>. Let me try again.\n"
    )


def test_context_numbers_the_passages_of_each_search_and_skips_empty_ones() -> None:
    messages = (Message(role="user", content="q"),)
    question = Question(uid="u", text="q?", messages=messages, golds=("a",), data_source="d")
    trajectory = Trajectory(
        question=question,
        sample=0,
        prompt_ids=np.array([1], np.int32),
        turns=(make_turn(BOLTON), make_turn(), make_turn(LEEDS)),
        stop=Stop.BUDGET,
    )
    assert render_context(trajectory) == (
        'Doc 1(Title: "Bolton") Bolton is a town in England.\nDoc 1(Title: "Leeds") Leeds is a city.'
    )


def test_the_embedded_world_was_trained_on_the_same_texts() -> None:
    pages = [text.Passage("Bolton", "Bolton is a town."), text.Passage("Leeds", "Leeds is a city.")]
    passages = []
    for page in pages:
        title, _, body = page.contents.partition("\n")
        passages.append(Passage(id="0", title=title, text=body, score=1.0))
    assert text.observation(pages) == wrap_observation(render_passages(passages))
    assert text.INVALID_ACTION == RETRY


def test_instruction_names_the_tags_and_ends_with_the_question() -> None:
    instruction = search_instruction(" Where was Alice born ")
    assert instruction.endswith("Question: Where was Alice born?\n")
    for tag in ("<think>", "</think>", "<search>", "</search>", "<information>", "</information>"):
        assert tag in instruction
    assert search_instruction("Who?").endswith("Question: Who?\n")


def test_agent_imports_without_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "import verl.agent.loop, verl.agent.actions, verl.agent.prompts\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'httpx', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

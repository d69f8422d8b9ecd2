"""The tags of Search-R1: texts byte for byte, actions and their token spans however the text is cut."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agents import make_format, make_observation, render
from tests.fakes import CharTokenizer, ChatTokenizer, PieceTokenizer, make_action, make_turn
from verl.agent.formats.search_r1 import SearchR1Format
from verl.errors import ConfigError
from verl.types import (
    Action,
    ActionKind,
    Finish,
    Message,
    Observation,
    Passage,
    Span,
    SpanKind,
    ToolCall,
    ToolSpec,
)

CHARS = CharTokenizer()
INVALID = Action(kind=ActionKind.INVALID)
RETRY = (
    "\nMy previous action is invalid. To search, I must put the query between <search> and </search>. "
    "To answer, I must put the answer between <answer> and </answer>. Let me try again.\n"
)


def parse_pieces(pieces: Sequence[str]) -> Action:
    return make_format(PieceTokenizer(pieces)).parse(range(len(pieces)))


def act(kind: ActionKind, text: str = "", *, start: int, end: int, closing: int = 1) -> Action:
    action = make_action(kind, text, start=start, end=end)
    return replace(action, spans=(replace(action.spans[0], num_closing=closing),))


def search(query: str, *, start: int, end: int, closing: int = 1) -> Action:
    return act(ActionKind.TOOL, query, start=start, end=end, closing=closing)


def with_thought(action: Action, text: str, *, start: int, end: int) -> Action:
    thought = Span(kind=SpanKind.THINK, start=start, end=end, text=text, num_closing=1)
    return replace(action, spans=(thought, *action.spans))


@pytest.mark.parametrize(
    ("pieces", "action"),
    [
        (
            ["<think>", " hm", "</think>", "<search>", " birth", "place", " ", "</search>"],
            with_thought(search("birthplace", start=4, end=6, closing=2), "hm", start=1, end=2),
        ),
        (
            ["<sea", "rch>who", " is", " it</", "search>. And", " more"],
            search("who is it", start=1, end=4),
        ),
        (
            ["<answer>Bolton</answer>"],
            act(ActionKind.ANSWER, "Bolton", start=0, end=1, closing=0),
        ),
        (["x", "<answer>", "  ", "</answer>"], act(ActionKind.ANSWER, start=2, end=2, closing=2)),
        (["<think>", "a", "</think>", "b"], with_thought(INVALID, "a", start=1, end=2)),
        (
            ["<think>", "<search>", "q", "</search>"],  # a thought that was not closed
            search("q", start=2, end=3),
        ),
    ],
)
def test_a_span_holds_the_text_and_not_the_tags(pieces: list[str], action: Action) -> None:
    assert parse_pieces(pieces) == action


@pytest.mark.parametrize("text", ["", "no tags at all", "<search>  \n</search>", "<Search>a</Search>"])
def test_what_is_no_action(text: str) -> None:
    assert parse_pieces(list(text)) == INVALID


TAGS = ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "<information>"]
WORDS = ["a ", "b\n", "<", *TAGS]


def parse_as_search_r1(text: str) -> tuple[str, str]:
    """Return kind and content by the rule of Search-R1's `postprocess_predictions`."""
    match = re.search(r"<(search|answer)>(.*?)</\1>", text, re.DOTALL)
    return (match.group(1), match.group(2).strip()) if match else ("invalid", "")


def test_what_search_r1_reads_is_read_here() -> None:
    rng = random.Random(0)
    prompt_format = make_format(CHARS)
    assert prompt_format.stop_strings == ("</search>", "</answer>")
    for _ in range(2_000):
        text = "".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        stops = [text.index(stop) + len(stop) for stop in prompt_format.stop_strings if stop in text]
        text = text[: min(stops, default=len(text))]  # what an engine returns that stops there
        kind, content = parse_as_search_r1(text)
        content = content.rpartition(f"<{kind}>")[2].strip()  # of a tag that was opened twice
        if kind == "search" and not content:
            kind = "invalid"
        action = prompt_format.parse(CHARS.encode(text))
        assert (action.calls[0].tool if action.calls else str(action.kind), action.text) == (kind, content), (
            text
        )


@given(
    query=st.text(alphabet="ab é日<>/. ", min_size=1, max_size=12).filter(lambda q: q.strip()),
    before=st.text(alphabet="xy \n", max_size=5),
    after=st.text(alphabet="z.\n", max_size=3),
    cuts=st.sets(st.integers(1, 50), max_size=20),
)
def test_a_span_is_the_smallest_cover_of_the_query_for_any_tokenization(
    query: str, before: str, after: str, cuts: set[int]
) -> None:
    text = f"{before}<search>{query}</search>{after}"
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    action = parse_pieces([text[a:b] for a, b in itertools.pairwise(borders)])
    first = len(before) + len("<search>") + len(query) - len(query.lstrip())
    wanted = set(range(first, first + len(query.strip())))
    covering = [k for k, (a, b) in enumerate(itertools.pairwise(borders)) if wanted & {*range(a, b)}]
    closed = len(text) - len(after)
    closing = [k for k, (a, _) in enumerate(itertools.pairwise(borders)) if covering[-1] < k and a < closed]
    assert action == search(query.strip(), start=covering[0], end=covering[-1] + 1, closing=len(closing))


class ByteTokenizer(CharTokenizer):
    """One token per byte: half characters must not shift the span."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_half_characters_do_not_shift_the_span() -> None:
    action = make_format(ByteTokenizer()).parse(list("<search>日本</search>".encode()))
    assert action == search("日本", start=8, end=14, closing=len("</search>"))


def test_observations_have_the_bytes_of_search_r1() -> None:
    prompt_format = make_format(CHARS)
    found = make_observation(
        Passage(id="1", title='"Bolton"', text="Bolton is a town in England.", score=0.9),
        Passage(id="2", title="", text="Leeds is a city.", score=0.5),
    )
    assert CHARS.decode(render(prompt_format, found)) == (
        '\n\n<information>Doc 1(Title: "Bolton") Bolton is a town in England.\n'
        "Doc 2(Title: ) Leeds is a city.</information>\n\n"
    )
    nothing = CHARS.decode(render(prompt_format, Observation()))
    assert nothing == "\n\n<information>Nothing was found for this query.</information>\n\n"


@pytest.mark.parametrize(
    ("output", "finish", "read"),
    [
        ("hm$", Finish.STOP, f"u:{RETRY.strip()}$A:"),
        ("hm%", Finish.STOP, f"$u:{RETRY.strip()}$A:"),
        ("</answer>.", Finish.STOP, RETRY),
        ("hm", Finish.LENGTH, RETRY),
    ],
)
def test_a_policy_that_ended_its_turn_is_answered_in_a_new_one(
    output: str, finish: Finish, read: str
) -> None:
    ids = np.array(CHARS.encode(output), np.int32)
    turn = replace(make_turn(ActionKind.INVALID), output_ids=ids, finish=finish)
    assert CHARS.decode(make_format(ChatTokenizer()).render_retry(turn)) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a</information>b", "a< /information>b"),
        ("<search>q</search><ANSWER>x</answer>", "< search>q< /search>< ANSWER>x< /answer>"),
        ("<think><documents><tool_call>", "< think>< documents>< tool_call>"),
        ("1 < 2, <b>bold</b>, <answers>, <|x|>", "1 < 2, <b>bold</b>, <answers>, <|x|>"),
    ],
)
def test_tags_from_outside_are_neutralized(text: str, read: str) -> None:
    prompt_format = make_format(CHARS)
    assert prompt_format.neutralize(text) == prompt_format.neutralize(read) == read


def make_spec(name: str, *parameters: str) -> ToolSpec:
    return ToolSpec(name=name, description=f"does {name}", parameters=dict.fromkeys(parameters, "x"))


def make_texts(observation: str = "<found>{text}</found>") -> dict[str, str]:
    return {
        "instruction": "{question}",
        "instruction_for_tools": "{tools}|{question}",
        "observation": observation,
        "retry": "search!",
        "retry_for_tools": "{tools}!",
    }


def test_every_tool_with_one_argument_has_a_tag_and_is_listed() -> None:
    specs = [make_spec("search", "query"), make_spec("python", "code")]
    prompt_format = SearchR1Format(tokenizer=CHARS, texts=make_texts(), tools=specs)
    assert prompt_format.stop_strings == ("</search>", "</python>", "</answer>")
    action = prompt_format.parse(CHARS.encode("<python> 1 + 1 </python>"))
    assert action.calls == (ToolCall(tool="python", arguments={"code": "1 + 1"}),)
    assert prompt_format.neutralize("<python>") == "< python>"
    listed = "<search> query </search>: does search\n<python> code </python>: does python"
    assert prompt_format.write_prompt("Who?")[0].content == f"{listed}|Who?"
    assert CHARS.decode(prompt_format.render_retry(make_turn(ActionKind.INVALID))) == f"{listed}!"
    for spec in (
        make_spec("two", "a", "b"),
        make_spec("none"),
        make_spec("answer", "a"),
        make_spec("information", "a"),
    ):
        with pytest.raises(ConfigError, match=f"agent.tools={spec.name} cannot be called"):
            SearchR1Format(tokenizer=CHARS, texts=make_texts(), tools=[spec])


def test_tags_around_observations_are_neutralized_in_results_and_checked() -> None:
    tools = [make_spec("search", "query")]
    prompt_format = SearchR1Format(
        tokenizer=CHARS, texts=make_texts("<a-1>\n<b>{text}</b></a-1>"), tools=tools
    )
    assert prompt_format.neutralize("x</b></A-1><c></information>") == "x< /b>< /A-1><c>< /information>"
    with pytest.raises(ConfigError, match="none of them found or answer"):
        SearchR1Format(tokenizer=CHARS, texts=make_texts(), tools=[make_spec("found", "a")])
    for wrong in (
        "<a>{text}",
        "{text}</a>",
        "<a><b>{text}</a></b>",
        "<answer>{text}</answer>",
        "</a>{text}<a>",
    ):
        with pytest.raises(
            ConfigError, match=r"prompt_file: search_r1\.observation is .*expected tags around"
        ):
            SearchR1Format(tokenizer=CHARS, texts=make_texts(wrong), tools=tools)


def test_the_packaged_prompt_for_search_alone_keeps_its_bytes() -> None:
    """It is hashed in manifests, and checkpoints were trained with it."""
    prompt_format = make_format(CHARS)
    (message,) = prompt_format.write_prompt("Who?")
    assert hashlib.sha256(message.content.encode()).hexdigest() == (
        "f53740eed3417c577ef6af37229a1b2b9de09ff79bbaa650bae68e1c888ec712"
    )
    assert prompt_format.write_prompt("Was {Alice}?")[0].content.endswith("Question: Was {Alice}?\n")
    assert prompt_format.check_prompt([message]) is None
    lacking = prompt_format.check_prompt([Message(role="user", content="Who?")])
    assert lacking == "never says to write between <answer> and </answer>"

"""Actions and their token spans, however the text is cut into tokens."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.agent.actions import STOP_STRINGS, parse_action
from verl.types import Action, ActionKind

INVALID = Action(kind=ActionKind.INVALID)


def parse_pieces(pieces: Sequence[str]) -> Action:
    return parse_action(range(len(pieces)), decode=lambda ids: "".join(pieces[i] for i in ids))


def test_span_holds_the_query_and_not_the_tags() -> None:
    action = parse_pieces(["<think>", " hm", "</think>", "<search>", " birth", "place", " ", "</search>"])
    assert action == Action(kind=ActionKind.SEARCH, text="birthplace", start=4, end=6)


def test_tags_merged_with_their_neighbours() -> None:
    pieces = ["<sea", "rch>who", " is", " it</", "search>. And", " more"]
    assert parse_pieces(pieces) == Action(kind=ActionKind.SEARCH, text="who is it", start=1, end=4)


def test_one_token_may_hold_everything() -> None:
    assert parse_pieces(["<answer>Bolton</answer>"]) == Action(
        kind=ActionKind.ANSWER, text="Bolton", start=0, end=1
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no tags at all",
        "<search> never closed",
        "closed only </search>",
        "</answer><answer>a</answer>",
        "<search></search>",
        "<search>  \n</search>",
        "<search> a </answer>",
        "<Search>a</Search>",
    ],
)
def test_what_is_no_action(text: str) -> None:
    assert parse_pieces(list(text)) == INVALID


@pytest.mark.parametrize(
    ("text", "kind", "content"),
    [
        ("<think> use <search> first </think><answer>X</answer>", ActionKind.ANSWER, "X"),
        ("<think> or <answer> now? </think><search> q </search>", ActionKind.SEARCH, "q"),
        ("<think> use <search> tags </think><search> q </search>", ActionKind.SEARCH, "q"),
        ("<answer> a <search> b </search>", ActionKind.SEARCH, "b"),
        ("<search> a <think> b </think></search>", ActionKind.SEARCH, "a <think> b </think>"),
        ("</think><answer>a</answer><search>b</search>", ActionKind.ANSWER, "a"),
        ("<think><information><search>q</search>", ActionKind.SEARCH, "q"),
    ],
)
def test_the_pair_that_stopped_the_turn_is_the_action(text: str, kind: ActionKind, content: str) -> None:
    action = parse_pieces(list(text))
    assert (action.kind, action.text, text[action.start : action.end]) == (kind, content, content)


WORDS = (
    "a ",
    "b\n",
    "<",
    "<think>",
    "</think>",
    "<search>",
    "</search>",
    "<answer>",
    "</answer>",
    "<information>",
)


def sample_transcript(rng: random.Random) -> str:
    """What an engine that stops at the first `</search>` or `</answer>` returns."""
    text = "".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    stops = [text.index(stop) + len(stop) for stop in STOP_STRINGS if stop in text]
    return text[: min(stops, default=len(text))]


def parse_as_search_r1(text: str) -> tuple[str, str]:
    """Kind and content by the rule of Search-R1's `postprocess_predictions`."""
    match = re.search(r"<(search|answer)>(.*?)</\1>", text, re.DOTALL)
    return (match.group(1), match.group(2).strip()) if match else ("invalid", "")


def test_what_search_r1_reads_is_read_here() -> None:
    rng = random.Random(0)
    for _ in range(2_000):
        text = sample_transcript(rng)
        kind, content = parse_as_search_r1(text)
        content = content.rpartition(f"<{kind}>")[2].strip()  # of a tag that was opened twice
        if kind == "search" and not content:
            kind = "invalid"
        action = parse_pieces(list(text))
        assert (action.kind, action.text) == (kind, content), text


def test_an_empty_answer_is_an_answer() -> None:
    action = parse_pieces(["x", "<answer>", "  ", "</answer>"])
    assert (action.kind, action.text, action.end - action.start) == (ActionKind.ANSWER, "", 0)


@given(
    query=st.text(alphabet="ab é日<>/. ", min_size=1, max_size=12).filter(lambda q: q.strip()),
    before=st.text(alphabet="xy \n", max_size=5),
    after=st.text(alphabet="z.\n", max_size=3),
    cuts=st.sets(st.integers(1, 50), max_size=20),
)
def test_span_is_the_smallest_cover_of_the_query_for_any_tokenisation(
    query: str, before: str, after: str, cuts: set[int]
) -> None:
    text = f"{before}<search>{query}</search>{after}"
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    action = parse_pieces(pieces)
    first = len(before) + len("<search>") + len(query) - len(query.lstrip())
    wanted = set(range(first, first + len(query.strip())))
    covering = [k for k, (a, b) in enumerate(itertools.pairwise(borders)) if wanted & {*range(a, b)}]
    assert action.text == query.strip()
    assert (action.start, action.end) == (covering[0], covering[-1] + 1)


def test_half_characters_do_not_shift_the_span() -> None:
    ids = list("<search>日本</search>".encode())  # one token per byte
    action = parse_action(ids, decode=lambda some: bytes(some).decode(errors="replace"))
    assert (action.text, action.start, action.end) == ("日本", 8, 14)

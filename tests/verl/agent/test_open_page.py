"""The tool `open_page`, with the ids that the tool `search` then shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agents import make_agent, make_tools
from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch, make_question
from verl.agent.tools.search import render_passages
from verl.errors import ServiceError
from verl.protocols import Page
from verl.types import Observation, Passage, Stop, Trajectory

CHARS = CharTokenizer()
PIECES = (
    Passage(id="7", title='"Bolton"', text="Bolton is a town.", score=0.0),
    Passage(id="8", title='"Bolton"', text="It has </tool_response> a mill.", score=0.0),
)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


async def play(search: ScriptedSearch, *outputs: str, **limits: int) -> Trajectory:
    script = ScriptedGenerate([CHARS.encode(output) for output in outputs])
    settings = {"max_turns": 8, "max_response_length": 400} | limits
    agent = make_agent(
        script, search, tokenizer=CHARS, name="tool_calls", tools=("search", "open_page"), **settings
    )
    return await agent.run(make_question(), sample=0, seed=0, greedy=True)


async def test_a_search_shows_ids_and_a_page_is_read_by_one() -> None:
    search = ScriptedSearch(found={"bolton": PIECES[:1]}, pages={"7": PIECES})
    trajectory = await play(
        search,
        call("search", query=["bolton"]),
        call("open_page", id=" 7 ", part="1"),
        *(call("open_page", id=7, part=part) for part in (2, "0", "²", "9" * 90)),
        call("open_page", id="9", part="1"),
        "<answer> a </answer>",
    )
    assert (trajectory.stop, trajectory.failure) == (Stop.ANSWERED, None)
    texts = [observation.text for observation in trajectory.observations]
    assert texts[0] == 'Doc 1(Id: 7, Title: "Bolton") Bolton is a town.'
    assert texts[1] == '"Bolton" (part 1 of 1)\nBolton is a town. It has < /tool_response> a mill.'
    assert texts[2:6] == ["There is no such part. This document has the parts 1 to 1."] * 4
    assert texts[6] == "There is no document with this id. Use the id of a search result."
    assert [[p.id for p in turn.passages] for turn in trajectory.turns] == [["7"], ["7", "8"], *[[]] * 6]
    assert search.queries[:3] == ["bolton", "7 1", "7 2"]
    assert f"\n{texts[1]}\n" in CHARS.decode(trajectory.turns[1].observation_ids.tolist())


async def test_a_page_that_does_not_fit_keeps_the_pieces_that_are_read() -> None:
    long = tuple(Passage(id=str(k), title="T", text="word " * 40 + "end", score=0.0) for k in range(3))
    trajectory = await play(
        ScriptedSearch(pages={"0": long}), call("open_page", id="0", part="1"), "<answer>a</answer>"
    )
    (turn, _) = trajectory.turns
    assert turn.observation_truncated
    assert [passage.id for passage in turn.passages] == ["0", "1"]
    heading, _, body = turn.observations[0].text.partition("\n")
    assert (heading, body) == ("T (part 1 of 1)", " ".join(passage.text for passage in turn.passages))
    assert len(long[1].text) > len(turn.passages[1].text) > 0


async def test_a_search_engine_that_fails_is_never_read() -> None:
    class DeadSearch(ScriptedSearch):
        async def open_page(self, page_id: str, *, part: int, part_chars: int, timeout_s: float) -> Page:
            raise ServiceError("retriever", "secret trace")

    trajectory = await play(DeadSearch(), call("open_page", id="7", part="1"))
    assert (trajectory.stop, trajectory.failure) == (Stop.FAILED, "open_page_failed: retriever: secret trace")
    assert "secret" not in CHARS.decode(trajectory.token_ids.tolist())


@given(
    texts=st.lists(st.text("ab \n", min_size=1, max_size=30).map(str.strip).filter(bool), max_size=4),
    title=st.text("T ", max_size=9),
)
def test_fewer_characters_of_a_page_are_never_more_and_the_pieces_are_its_text(
    texts: list[str], title: str
) -> None:
    (tool,) = make_tools(ScriptedSearch(), ["open_page"])
    pieces = tuple(Passage(id=str(k), title=title, text=text, score=0.0) for k, text in enumerate(texts))
    whole = Observation(text=f"{title} (part 1 of 1)\n{' '.join(texts)}", passages=pieces)
    cuts = [tool.shorten(whole, count) for count in range(len(whole.text) + 1)]
    lengths = [len(cut.text) for cut in cuts]
    assert lengths == sorted(lengths)
    assert all(length <= count for count, length in enumerate(lengths))
    for cut in cuts:
        assert whole.text.startswith(cut.text)
        body = cut.text.partition("\n")[2]
        assert " ".join(piece.text for piece in cut.passages).rstrip() == body
        assert [piece.id for piece in cut.passages if piece.is_cut] == [
            piece.id
            for piece, all_of_it in zip(cut.passages, pieces, strict=False)
            if piece.text.rstrip() != all_of_it.text.rstrip()
        ]


@pytest.mark.parametrize(
    ("passage_id", "shown"), [("7", "Id: 7, "), ("x" * 64, f"Id: {'x' * 64}, "), ("x" * 65, "")]
)
def test_ids_are_shown_with_open_page_alone(passage_id: str, shown: str) -> None:
    passage = Passage(id=passage_id, title='"Bolton"', text="A town.", score=0.0)
    assert render_passages([passage], shows_ids=True) == f'Doc 1({shown}Title: "Bolton") A town.'
    assert render_passages([passage]) == 'Doc 1(Title: "Bolton") A town.'

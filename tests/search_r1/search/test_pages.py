"""Whole pages by the id of a passage: the table of ids, joining, parts, and the route over a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r1.search import id_table, pages, sidecar
from search_r1.search.client import HttpSearch
from search_r1.search.corpus import open_corpus
from search_r1.search.errors import ChangedFileError, RetrieverError
from search_r1.search.id_table import IdTable, find_numbered_row
from search_r1.search.pages import cut_page, list_page
from search_r1.search.schema import Document
from tests.fakes import Reply, ScriptedServer
from tests.search_r1.search.servers import EchoRetriever, serving
from verl.errors import ServiceError
from verl.types import Passage

CONTENTS = [
    '"Bolton"\nBolton is a town.',
    '"Bolton"\nIt has an old mill and a river.',
    '"Bolton"\nThe mill burned down in 1904.',
    '"Calder"\nCalder is a town.',
    "a line without a title",
    '"Bolton"\nAnother town of that name.',
]


def write(path: Path, ids: Iterable[object]) -> Path:
    rows = zip(ids, CONTENTS, strict=True)
    path.write_text("".join(json.dumps({"id": i, "contents": text}) + "\n" for i, text in rows))
    return path


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("ids", [["0", "1", "2", "3", "4", "5"], ["0", "5", "a", "é", "5", "00"]])
def test_rows_by_id_with_a_table_that_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[str], is_large: bool
) -> None:
    monkeypatch.setattr(sidecar, "SIDECAR_FROM_BYTES", 0 if is_large else 1 << 20)
    corpus = open_corpus(write(tmp_path / "corpus.jsonl", ids))
    for _ in range(2):
        table = IdTable(corpus, stop=threading.Event())
        is_numbered = ids[1] == "1"
        rows = {name: table.find(name) for name in [*ids, "6", "-1", ""]}
        expected = {} if is_numbered else {name: ids.index(name) for name in ids}
        assert {name: row for name, row in rows.items() if row is not None} == expected
        table.close()
        if is_large:  # the second opening reads no passage
            monkeypatch.setattr(id_table, "_make_table", None)
            kept = np.load(tmp_path / "corpus.jsonl.ids.npy", mmap_mode="r")
            assert len(kept) == 7 + (0 if is_numbered else 12)
    numbered = [find_numbered_row(corpus, name) for name in ["0", "1", "5", "6", "00", "1e", "²", "9" * 5000]]
    assert numbered == ([0, 1, 5] if is_numbered else [0, None, None]) + [None] * 5


def test_a_stopped_table_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "SIDECAR_FROM_BYTES", 0)
    corpus = open_corpus(write(tmp_path / "corpus.jsonl", "abcdef"))
    stop = threading.Event()
    stop.set()
    with pytest.raises(RetrieverError, match="shutting down"):
        IdTable(corpus, stop=stop)
    assert not (tmp_path / "corpus.jsonl.ids.npy").exists()


def test_a_page_is_all_consecutive_passages_of_a_title(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = [Document(id=str(k), contents=contents) for k, contents in enumerate(CONTENTS)]

    def list_ids(row: int) -> list[str]:
        return [p.id for p in list_page(row, read=corpus.__getitem__, num_rows=len(corpus))]

    together = ["0", "1", "2"]
    assert [list_ids(row) for row in range(6)] == [together, together, together, ["3"], ["4"], ["5"]]
    monkeypatch.setattr(pages, "MAX_PASSAGES", 2)  # a title of that many passages names no page
    assert [list_ids(row) for row in range(4)] == [["0"], ["1"], ["2"], ["3"]]


@given(
    texts=st.lists(st.text("ab \n\t", max_size=40), min_size=1, max_size=6),
    part_chars=st.integers(1, 60),
)
def test_parts_hold_the_whole_text_in_order_and_name_its_passages(texts: list[str], part_chars: int) -> None:
    passages = [Document(id=str(k), contents=f"T\n{text}") for k, text in enumerate(texts)]
    first = cut_page(passages, part=1, part_chars=part_chars)
    parts = [cut_page(passages, part=k, part_chars=part_chars) for k in range(1, first.num_parts + 2)]
    assert {page.title for page in parts} == {"T"}
    assert parts[-1].passages == []  # there is no such part
    shown = [" ".join(piece.text for piece in page.passages) for page in parts[:-1]]
    assert all(len(text) <= part_chars for text in shown)
    letters = "".join(texts).translate(dict.fromkeys(map(ord, " \n\t")))
    assert "".join(shown).translate(dict.fromkeys(map(ord, " \n\t"))) == letters
    by_passage = {k: "" for k in range(len(texts))}
    for piece in (piece for page in parts for piece in page.passages):
        by_passage[int(piece.id)] += piece.text
    assert ["".join(text.split()) for text in by_passage.values()] == [
        "".join(text.split()) for text in texts
    ]
    if part_chars > max(len(text) for text in texts):  # no word is longer than a part
        assert " ".join(shown).split() == " ".join(texts).split()


async def test_pages_over_a_socket(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", ["0", "1", "2", "x", "4", "5"])
    async with serving(EchoRetriever(), corpus_path=path) as client:
        search = HttpSearch(str(client.base_url), topk=2, timeout_s=20.0)

        async def open_page(name: str, part: int = 1) -> list[Passage] | None:
            page = await search.open_page(name, part=part, part_chars=100, timeout_s=20.0)
            assert page is None or (page.part, page.num_parts, page.title) == (part, 1, page.title)
            return None if page is None else list(page.passages)

        pieces = await open_page("1")
        assert pieces is not None
        assert [(p.id, p.title) for p in pieces] == [(str(k), '"Bolton"') for k in range(3)]
        assert " ".join(p.text for p in pieces) == " ".join(c.split("\n")[1] for c in CONTENTS[:3])
        assert [p.text for p in await open_page("x") or []] == ["Calder is a town."]
        assert [p.title for p in await open_page("4") or []] == [""]
        assert await open_page("1", part=2) == []
        for unknown in ("3", "y", "", "\ud800", "9" * 5000):
            assert await open_page(unknown) is None
        await search.aclose()
        for wrong in (
            {},
            {"id": None},
            {"id": "1", "part": 0},
            {"id": "1", "part_chars": 1},
            {"id": "a" * 1001},
        ):
            assert (await client.post("/page", json=wrong)).status_code == 422
        path.write_text(path.read_text().replace("Calder", "Dalder"))
        answer = await client.post("/page", json={"id": "x"})
        assert (answer.status_code, "was rewritten" in answer.text) == (503, True)


async def test_a_server_without_pages_is_a_failure_and_not_an_unknown_id() -> None:
    async with serving(EchoRetriever()) as client:
        search = HttpSearch(str(client.base_url), topk=2, timeout_s=20.0)
        with pytest.raises(ServiceError, match=r"serves no pages.*online engine"):
            await search.open_page("1", part=1, part_chars=100, timeout_s=20.0)
        await search.aclose()


@pytest.mark.parametrize("body", ["{}", '{"page": {"title": "T", "part": 1}}'])
async def test_a_malformed_page_is_a_failure(body: str) -> None:
    async with ScriptedServer(script=[Reply(body)]).running() as server:
        search = HttpSearch(server.url, topk=2, timeout_s=20.0)
        with pytest.raises(ServiceError, match="the page is malformed: page"):
            await search.open_page("1", part=1, part_chars=100, timeout_s=20.0)
        await search.aclose()


def test_a_changed_corpus_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", "abcdef")
    corpus = open_corpus(path)
    table = IdTable(corpus, stop=threading.Event())
    path.write_text("short")
    with pytest.raises(ChangedFileError):
        table.find("a")

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from search_r1.search.assemble import open_retriever
from search_r1.search.index_cli import main
from search_r1.search.retriever import FailureKind, Hit, Outcome, SearchFailure
from search_r1.search.schema import Document
from search_r1.search.settings import add_retriever_arguments, resolve_retriever
from tests.search_r1.search.servers import EchoRetriever, serving
from tests.search_r1.search.small_world import PASSAGES, REPOSITORY, write_corpus

WORLD = REPOSITORY / "world"


def found(*ids: str) -> Outcome:
    return tuple(Hit(document=Document(id=name, contents=PASSAGES[name]), score=1.0) for name in ids)


def asked(question: str, gold: str, *ids: str, texts: tuple[str, ...] = ()) -> dict[str, object]:
    support = {"supporting_ids": ids, "supporting_texts": texts} if ids else {}
    return {
        "question": question,
        "golden_answers": [gold],
        "data_source": "nq" if ids else "tq",
        "extra_info": {"split": "test", "index": question, **support},
    }


FAILURE = SearchFailure(kind=FailureKind.DEADLINE, reason="late")
ALICE = PASSAGES["1"]
ROWS: dict[str, tuple[dict[str, object], dict[str, Outcome]]] = {
    "found": (asked("a", "Bolton", "1", texts=(ALICE,)), {"a": found("1", "0")}),
    "found by title": (asked("b", "Bolton", "Alice Marsh", "Bolton"), {"b": found("1", "0")}),
    "beyond k, reachable": (
        asked("c", "Bolton", "1", texts=(ALICE,)),
        {"c": found("0", "2", "1"), "Alice Marsh Alice Marsh was born in Bolton.": found("1")},
    ),
    "out of reach": (asked("d", "Calder", "Brann Works"), {"d": found("0"), "Brann Works": found("4")}),
    "missing": (asked("e", "x", "1", "nowhere"), {"e": found("1"), "nowhere": ()}),
    "gold reachable": (asked("f", "Scotland"), {"f": (), "f Scotland": found("4")}),
    "gold out of reach": (asked("g", "makes ships"), {"g": (), "g makes ships": ()}),
    "gold missing": (asked("h", "Paris"), {"h": (), "h Paris": ()}),
    "by chance": (asked("i", "No"), {"i": found("1")}),
    "failed": (asked("j", "x", "1"), {"j": FAILURE}),
    "not findable": (asked("k", "A"), {"k": (), "k A": ()}),
}
EXPECTED = [
    *("found", "found", "reachable", "out of reach", "missing"),
    *("reachable", "out of reach", "missing", "unknown", "unknown", "unknown"),
]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("has_corpus", [True, False])
async def test_each_question_has_one_of_five_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_corpus: bool
) -> None:
    """With the corpus all of them are distinguished; without it a title or gold answer stays unknown."""
    questions, output = tmp_path / "q.jsonl", tmp_path / "new" / "audit.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row, _ in ROWS.values()))
    corpus = write_corpus(tmp_path / "corpus.jsonl", PASSAGES)
    retriever = EchoRetriever(act={query: hits for _, acts in ROWS.values() for query, hits in acts.items()})
    async with serving(retriever) as client:
        flags = ["--questions", str(questions), "--url", str(client.base_url), "--output", str(output)]
        flags += ["--corpus_path", str(corpus)] if has_corpus else []
        assert await asyncio.to_thread(main, ["audit", *flags, "--topk", "2", "--depth", "5"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    lines = read_lines(output)
    statuses = [line["status"] for line in lines]
    if has_corpus:
        assert statuses == EXPECTED
        assert [item["in_corpus"] for item in lines[4]["items"]] == [True, False]
        assert (lines[2]["items"][0]["rank"], lines[2]["items"][0]["own_rank"]) == (3, 1)
        assert [lines[row]["evidence"] for row in (0, 5, 8)] == ["supporting_ids", "gold_strings", "none"]
        summary = json.loads(last)
        assert summary["status"] == {
            "found": 2,
            "reachable": 2,
            "out of reach": 2,
            "missing": 2,
            "unknown": 3,
        }
        assert (summary["by_source"]["nq"]["questions"], summary["failed"]) == (6, 1)
        assert lines[0]["uid"] == "nq/test/a"
        assert "66.7%" not in "".join(shown)  # of the eight that are known, two each
        assert "25.0%" in "".join(shown)
    else:
        assert set(statuses) == {"found", "reachable", "unknown"}


async def test_the_embedded_world_over_a_socket_and_from_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_retriever_arguments(parser)
    retriever = await open_retriever(resolve_retriever(parser.parse_args([])))
    common = ["audit", "--questions", str(WORLD / "test.parquet"), "--num_questions", "80"]
    async with serving(retriever, corpus_path=WORLD / "corpus.jsonl") as client:
        flags = ["--url", str(client.base_url), "--output", str(tmp_path / "socket.jsonl")]
        assert await asyncio.to_thread(main, [*common, *flags]) == 0
    await retriever.aclose()
    over_socket = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert await asyncio.to_thread(main, [*common, "--output", str(tmp_path / "folder.jsonl")]) == 0
    assert (tmp_path / "socket.jsonl").read_bytes() == (tmp_path / "folder.jsonl").read_bytes()
    one, two = (over_socket["by_source"][name]["status"] for name in ("world_onehop", "world_twohop"))
    # The question finds one hop; the second takes a query that only the first passage suggests.
    assert one["found"] > 0.9 * sum(one.values())
    assert two["reachable"] > 0.9 * sum(two.values())
    assert over_socket["evidence"]["supporting_ids"] == 80


async def test_an_id_that_the_corpus_lacks_is_missing_for_a_server_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "q.jsonl"
    rows = [asked("a", "x", "77", texts=("Title\ntext",)), asked("b", "x", "x7", texts=(PASSAGES["x7"],))]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = write_corpus(tmp_path / "corpus.jsonl", PASSAGES)
    async with serving(EchoRetriever(), corpus_path=corpus) as client:
        flags = ["--questions", str(questions), "--url", str(client.base_url)]
        assert await asyncio.to_thread(main, ["audit", *flags]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["status"]["missing"], summary["status"]["out of reach"]) == (1, 1)


def test_of_an_online_engine_the_corpus_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps(asked("a", "x", "nowhere")) + "\n")
    assert main(["audit", "--questions", str(questions), "--retriever_name", "mock"]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["status"]["missing"], summary["status"]["unknown"]) == (0, 1)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--topk", "0"], "--topk must be in 1"),
        (["--topk", "5", "--depth", "4"], "--depth must be at least --topk (5), got 4"),
        (["--url", "http://x", "--index_path", "y"], "has its own --index_path"),
        (["--url", "nothing", "--output", "/dev/null/x"], "--output /dev/null/x: "),
        (["--url", "nothing", "--output", "/"], "--output / cannot be written"),
    ],
)
def test_wrong_settings_are_named(flags: list[str], complaint: str, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["audit", *flags]) == 1
    assert complaint in caplog.text

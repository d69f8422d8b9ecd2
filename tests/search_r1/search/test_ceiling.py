from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from pyarrow import Table as ArrowTable
from pyarrow import parquet

from search_r1.search.asking import AskedQuestion, read_questions, wilson_share
from search_r1.search.bm25 import build_bm25
from search_r1.search.ceiling import measure_ranks, share_within
from search_r1.search.index_cli import main
from search_r1.search.retriever import FailureKind, Found, Hit, Outcome, SearchFailure
from search_r1.search.schema import Document
from tests.fakes import Reply, ScriptedServer
from tests.search_r1.search.servers import EchoRetriever, serving
from tests.search_r1.search.small_world import write_corpus

BOLTON = AskedQuestion(text="Where was Alice Marsh born?", golds=("Bolton",), data_source="one")


def hits(*contents: str) -> Found:
    return tuple(
        Hit(document=Document(id=str(k), contents=text), score=1.0) for k, text in enumerate(contents)
    )


class FakeRetriever:
    """Answers what is scripted for a query, nothing else."""

    def __init__(self, outcomes: dict[str, Outcome], *, max_batch: int = 256) -> None:
        self.outcomes = outcomes
        self.max_batch = max_batch
        self.num_parallel_calls = 2
        self.num_passages = None
        self.batches: list[int] = []

    def describe(self) -> dict[str, str]:
        return {"index": "fake"}

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        self.batches.append(len(queries))
        found = [self.outcomes.get(query, ()) for query in queries]
        return [part if isinstance(part, SearchFailure) else part[:topk] for part in found]

    async def aclose(self) -> None:
        """Close nothing."""


def test_wilson_intervals() -> None:
    """8 of 10: textbook value 0.490 to 0.943; at the edges the interval stays inside and is not empty."""
    assert wilson_share(8, 10) == pytest.approx((0.8, 0.49016, 0.94331), abs=1e-5)
    none, every = wilson_share(0, 150), wilson_share(150, 150)
    assert none == pytest.approx((0.0, 0.0, 0.02497), abs=1e-4)
    assert every == pytest.approx((1.0, 1 - none[2], 1.0))


async def test_a_failed_search_is_neither_found_nor_missed() -> None:
    failure = SearchFailure(kind=FailureKind.DEADLINE, reason="late")
    outcomes: dict[str, Outcome] = {
        "first": hits("Bolton", "x"),
        "third": hits("x", "y", "in Bolton, England"),
        "never": hits("x"),
        "broken": failure,
        "nothing": (),
    }
    questions = [AskedQuestion(text=text, golds=("bolton",), data_source="s") for text in outcomes]
    retriever = FakeRetriever(outcomes, max_batch=2)
    settings = argparse.Namespace(answer_rule="folded", topk=[10], batch_size=64, timeout_s=1.0)
    ranks = await measure_ranks(questions, retriever, settings)
    assert [ranked.rank for ranked in ranks] == [1, 3, None, None, None]
    assert [ranked.failure for ranked in ranks] == [None, None, None, failure, None]
    assert sorted(retriever.batches) == [1, 2, 2]
    shares = [share_within(ranks, k) for k in (1, 3)]
    assert [share and share[0] for share in shares] == [1 / 4, 2 / 4]
    assert share_within(ranks[3:4], 1) is None


def test_questions_of_all_kinds_of_files(tmp_path: Path) -> None:
    lines = tmp_path / "mine.jsonl"
    lines.write_text(
        '{"question": " Where? ", "golden_answers": ["A", 1999]}\n\n'
        '{"question": "Who?", "answers": ["B"], "data_source": "nq"}\n'
    )
    table = tmp_path / "test.parquet"
    truth = {"style": "rule", "ground_truth": {"target": ["C"]}}
    parquet.write_table(
        ArrowTable.from_pylist([{"question": "When?", "data_source": "tq", "reward_model": truth}]), table
    )
    questions = read_questions([lines, table])
    assert [(q.text, q.golds, q.data_source) for q in questions] == [
        ("Where?", ("A", "1999"), "mine"),
        ("Who?", ("B",), "nq"),
        ("When?", ("C",), "tq"),
    ]
    assert len(read_questions([lines, table], limit=2)) == 2
    assert read_questions([lines, table], limit=2) == read_questions([lines, table], limit=2)


def write_questions(path: Path, count: int) -> Path:
    rows = [
        {"question": f"q{k}", "golden_answers": ["Bolton"], "data_source": "ab"[k % 2]} for k in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def test_the_command_from_questions_to_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = SearchFailure(kind=FailureKind.QUOTA, reason="spent")
    outcomes: dict[str, Outcome] = {f"q{k}": hits(*["x"] * k, "Bolton")[:5] for k in range(9)}
    outcomes["q9"] = failure
    questions = write_questions(tmp_path / "q.jsonl", 10)
    plot = tmp_path / "new" / "c.png"
    async with serving(EchoRetriever(act=outcomes)) as client:
        url = str(client.base_url)
        flags = ["--questions", str(questions), "--plot", str(plot), "--url", url]
        assert await asyncio.to_thread(main, ["ceiling", *flags, "--topk", "5", "1"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert (summary["questions"], summary["failed"], summary["failures"]) == (10, 1, {"quota": 1})
    assert summary["ceiling"] == {"1": pytest.approx(1 / 9, abs=1e-4), "5": pytest.approx(5 / 9, abs=1e-4)}
    assert summary["by_source"]["b"]["ceiling"]["5"] == pytest.approx(2 / 4)
    assert summary["retriever"]["retriever"] == {"retriever": "echo"}
    assert "55.6%" in "".join(shown)
    assert plot.read_bytes().startswith(b"\x89PNG")


async def test_nothing_but_failures_is_no_ceiling_of_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = SearchFailure(kind=FailureKind.REFUSED, reason="no")
    questions = write_questions(tmp_path / "q.jsonl", 2)
    async with serving(EchoRetriever(act={"q0": failure, "q1": failure})) as client:
        flags = [
            "--questions",
            str(questions),
            "--plot",
            str(tmp_path / "c.png"),
            "--url",
            str(client.base_url),
        ]
        assert await asyncio.to_thread(main, ["ceiling", *flags]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["ceiling"] == {"1": None, "3": None, "10": None, "100": None}
    assert not (tmp_path / "c.png").exists()


async def test_a_running_server_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"document": {"id": "1", "contents": "T\nBolton"}, "score": 1.0}
    replies = [Reply('{"index_sha256": "ab"}'), Reply(json.dumps({"result": [[document], []]}))]
    monkeypatch.setenv("RETRIEVER_TOKEN", "geheim")
    questions = write_questions(tmp_path / "q.jsonl", 2)
    async with (server := ScriptedServer(replies)).running():
        flags = ["--questions", str(questions), "--plot", str(tmp_path / "c.png"), "--url", server.url]
        assert await asyncio.to_thread(main, ["ceiling", *flags, "--topk", "3"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["ceiling"] == {"3": 0.5}
    assert summary["retriever"] == {"url": server.url, "index_sha256": "ab"}
    assert [headers["authorization"] for _, headers, _ in server.requests] == ["Bearer geheim"] * 2


UNSPACED = {
    "東京タワー": (
        "東京タワーは日本の東京都港区にある電波塔である。",
        "東京タワーはどこにありますか",
        "東京都港区",
    ),
    "上海": ("上海位于中国东部、长江入海口。", "上海在哪条河的入海口", "长江"),
    "北京": ("北京是中华人民共和国的首都。", "中国的首都是哪里", "北京。"),
    "大阪": ("大阪城は\uff11\uff15\uff18\uff13年に築かれた。", "大阪城はいつ築かれたか", "1583年"),
    "เชียงใหม่": ("จังหวัดเชียงใหม่อยู่ในภาคเหนือของประเทศไทย", "เชียงใหม่อยู่ในภาคใด", "ภาคเหนือ"),
}


@pytest.mark.parametrize(("rule", "share"), [("folded", 1.0), ("published", 0.6)])
def test_answers_in_scripts_without_spaces_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, share: float
) -> None:
    """With a real BM25 index: every answer is in the first passage, where it has no spaces around it."""
    corpus, index, questions = (tmp_path / name for name in ("corpus.jsonl", "bm25", "q.jsonl"))
    write_corpus(corpus, {title: f'"{title}"\n{text}' for title, (text, _, _) in UNSPACED.items()})
    build_bm25(corpus, index_path=index)
    rows = [{"question": asked, "golden_answers": [gold]} for _, asked, gold in UNSPACED.values()]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--retriever_name", "bm25", "--index_path", str(index), "--corpus_path", str(corpus)]
    flags += ["--questions", str(questions), "--plot", str(tmp_path / "c.png"), "--answer_rule", rule]
    assert main(["ceiling", *flags, "--topk", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ceiling"] == {"1": share}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--topk", "0"], "--topk must be in 1"),
        (["--num_questions", "0"], "--num_questions must be at least 1"),
        (["--timeout_s", "0"], "--timeout_s must be more than 0"),
        (["--url", "http://x", "--index_path", "y"], "has its own --index_path"),
        (["--url", "localhost:8000"], "URL of the retriever must look like"),
        (["--questions", "missing.jsonl"], "is not a file"),
    ],
)
def test_wrong_settings_are_said_and_end_with_1(
    flags: list[str], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["ceiling", *flags]) == 1
    assert complaint in caplog.text

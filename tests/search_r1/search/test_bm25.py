"""BM25: the scores, the text of queries, the files, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from search_r1.search.bm25 import MAX_QUERY_TERMS, Bm25Retriever, build_bm25, load_bm25
from search_r1.search.errors import RetrieverError
from serving.files import lock_file
from tests.search_r1.search.small_world import PASSAGES, REPOSITORY, write_corpus

FOUR = {
    "a": "red fox",
    "b": "red red river river runs",
    "c": "a fox and a river and a fox",
    "d": "quiet lake",
}


class Folder:
    """A corpus and its index; closes what it loaded."""

    def __init__(self, path: Path) -> None:
        self.corpus, self.index = path / "corpus.jsonl", path / "bm25"
        self._loaded: list[Bm25Retriever] = []

    def build(self, passages: dict[str, str], **settings: object) -> None:
        write_corpus(self.corpus, passages)
        build_bm25(self.corpus, index_path=self.index, **settings)  # type: ignore[arg-type]

    def load(self, **settings: object) -> Bm25Retriever:
        self._loaded.append(load_bm25(self.index, corpus_path=self.corpus, **settings))  # type: ignore[arg-type]
        return self._loaded[-1]

    def close(self) -> None:
        for retriever in self._loaded:
            retriever.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path)
    yield folder
    folder.close()


def ids(retriever: Bm25Retriever, query: str, *, topk: int = 10) -> list[str]:
    [hits] = retriever.search([query], topk=topk)
    return [hit.document.id for hit in hits]


def bm25(tf: int, *, df: int, length: int, mean_length: float, count: int = 4) -> float:
    """Robertson and Zaragoza 2009 with k1 = 1.2 and b = 0.75, and the idf that is never negative."""
    idf = math.log(1 + (count - df + 0.5) / (df + 0.5))
    return idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / mean_length))


def test_scores_are_those_of_the_formula(folder: Folder) -> None:
    folder.build(FOUR)
    [hits] = folder.load().search(["red rivers"], topk=10)
    mean = (2 + 5 + 8 + 2) / 4
    expected = {
        "b": bm25(2, df=2, length=5, mean_length=mean) + bm25(2, df=2, length=5, mean_length=mean),
        "a": bm25(1, df=2, length=2, mean_length=mean),
        "c": bm25(1, df=2, length=8, mean_length=mean),
    }
    # ln 2 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 4.25)) = 1.524924 / 1.723529
    assert expected["a"] == pytest.approx(0.884768, abs=1e-6)
    assert [hit.document.id for hit in hits] == ["b", "a", "c"]
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.document.id], rel=1e-5)
    assert hits[0].document.contents == FOUR["b"]


def test_equals_are_ordered_by_row_whatever_is_asked_for(folder: Folder) -> None:
    passages = {str(row): "the same words" if row % 7 else "other text" for row in range(2000)}
    folder.build(passages)
    retriever = folder.load()
    expected = [str(row) for row in range(2000) if row % 7]
    for topk in (1, 3, 100, 1000, 3000):
        assert ids(retriever, "same words", topk=topk) == expected[:topk]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("RUNNING rivers", {"b", "c"}),
        ('title:"lake" AND (', {"d", "c"}),  # "and" is a word like any other
        ("-lake", {"d"}),
        ("contents:lake^9", {"d"}),
        ("lak*", set()),
        ('"lake quiet"', {"d"}),
        ("lake\\", {"d"}),
        ("{lake TO lake]", {"d"}),
        ("lake~2 /lake/ [x", {"d"}),
        ("IN", set()),
        ("", set()),
        (" \n\t ", set()),
        ("?!.,;:()", set()),
        ("🎬", set()),
        ("\ud800", set()),
        ("lake \ud800", {"d"}),
        ("lake\x00", {"d"}),
    ],
)
def test_a_query_is_words_and_no_syntax(folder: Folder, query: str, found: set[str]) -> None:
    folder.build(FOUR)
    assert set(ids(folder.load(), query)) == found


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("grosse", "3"),
        ("GRÖSSE", "3"),
        ("gro\u0308ße", "3"),  # o and diaeresis apart
        ("漢", "3"),
        ("ＢＲＡＮＮ", "x7"),  # wide letters  # noqa: RUF001
        ("ship", "x7"),
    ],
)
def test_spelling_does_not_matter(folder: Folder, query: str, found: str) -> None:
    folder.build(PASSAGES)
    assert ids(folder.load(), query) == [found]


def test_scripts_without_spaces_are_found_by_character(folder: Folder) -> None:
    folder.build(
        {"0": "東京タワーは高い", "1": "京都の寺", "2": "हिन्दी भाषा", "3": "한국어 문서", "4": "ภาษาไทย"}
    )
    retriever = folder.load()
    assert ids(retriever, "東京")[0] == "0"
    assert ids(retriever, "寺") == ["1"]
    assert ids(retriever, "हिन्दी") == ["2"]
    assert ids(retriever, "한국어") == ["3"]
    assert ids(retriever, "ไทย") == ["4"]


def test_a_query_of_ten_thousand_words(folder: Folder) -> None:
    folder.build(FOUR)
    retriever = folder.load()
    words = " ".join(f"w{n}" for n in range(10_000))
    assert ids(retriever, "lake " + words) == ["d"]
    assert ids(retriever, "lake " * 10_000) == ["d"]
    assert ids(retriever, words + " lake") == []  # beyond the first 512 terms
    assert MAX_QUERY_TERMS == 512


def test_another_corpus_is_refused_by_name(folder: Folder) -> None:
    folder.build(FOUR)
    write_corpus(folder.corpus, FOUR | {"e": "one more"})
    with pytest.raises(RetrieverError, match=r"(?s)does not belong.*count: index was built with 4, found 5"):
        folder.load()
    write_corpus(folder.corpus, FOUR | {"d": "quiet cake"})
    with pytest.raises(RetrieverError, match=r"corpus.fingerprint: index was built with"):
        folder.load()


def test_files_that_lie_are_found_by_their_content(folder: Folder) -> None:
    """The manifest vouches for a corpus that the index does not hold: known passages are not found."""
    folder.build({str(row): f"word{row} thing{row}" for row in range(20)})
    manifest = json.loads((folder.index / "bm25.json").read_text())
    folder.build({str(row): f"term{row} stuff{row}" for row in range(20)})
    newer = json.loads((folder.index / "bm25.json").read_text())
    write_corpus(folder.corpus, {str(row): f"word{row} thing{row}" for row in range(20)})
    (folder.index / "bm25.json").write_text(json.dumps(newer | {"corpus": manifest["corpus"]}))
    with pytest.raises(RetrieverError, match="10 of 10 known passages do not find themselves"):
        folder.load()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"analysis": 0}, "analysis: index was built with 0"),
        ({"k1": 0.9}, "k1: index was built with 0.9"),
        ({"language": "klingon"}, "malformed: language"),
        ({"version": 2}, "malformed: version"),
        ({"folder": "../../elsewhere"}, "malformed: folder"),
        ({"count": None}, "malformed: count"),
        ({"kind": "flat"}, "malformed: kind"),
    ],
)
def test_a_changed_manifest_is_refused_by_name(folder: Folder, change: dict[str, object], named: str) -> None:
    folder.build(FOUR)
    path = folder.index / "bm25.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RetrieverError, match=named):
        folder.load()


def test_damage_is_refused_by_name(folder: Folder) -> None:
    folder.build(FOUR)
    [terms] = (folder.index / "terms-1").glob("*.idx")
    content = terms.read_bytes()
    terms.write_bytes(content[:-1])
    with pytest.raises(
        RetrieverError, match=rf"files.{terms.name}.bytes: index was built with {len(content)}"
    ):
        folder.load()
    terms.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(RetrieverError, match=rf"files.{terms.name}.fingerprint"):
        folder.load()
    terms.unlink()
    with pytest.raises(RetrieverError, match=rf"files.{terms.name}: missing"):
        folder.load()


def test_what_is_no_index_is_named_with_the_command_that_makes_one(folder: Folder) -> None:
    write_corpus(folder.corpus, FOUR)
    with pytest.raises(RetrieverError, match=r"does not exist; build it: .* --retrieval_method bm25"):
        folder.load()
    folder.index.mkdir()
    with pytest.raises(RetrieverError, match=r"is not a BM25 index \(it has no bm25.json\)"):
        folder.load()
    folder.build(FOUR)
    folder.corpus.unlink()
    with pytest.raises(RetrieverError, match=r"corpus .* is not a file"):
        folder.load()


def test_what_is_no_index_is_not_replaced(folder: Folder) -> None:
    folder.index.mkdir()
    (folder.index / "thesis.tex").write_text("years of work")
    with pytest.raises(RetrieverError, match="is not a BM25 index, so it is not replaced"):
        folder.build(FOUR)
    assert (folder.index / "thesis.tex").exists()
    shutil.rmtree(folder.index)
    folder.index.write_text("a file")
    with pytest.raises(RetrieverError, match="is not a BM25 index, so it is not replaced"):
        folder.build(FOUR)


def test_an_unknown_language_is_named_before_anything_is_written(folder: Folder) -> None:
    with pytest.raises(RetrieverError, match=r"'klingon' is unknown; expected one of \('english', 'none'\)"):
        folder.build(FOUR, language="klingon")
    assert not folder.index.exists()


def test_a_malformed_line_is_named_and_the_old_index_stands(folder: Folder) -> None:
    folder.build(FOUR)
    kept = folder.corpus.read_text()
    folder.corpus.write_text(kept + "{broken\n")
    with pytest.raises(RetrieverError, match=r"corpus.jsonl:5 is not JSON"):
        build_bm25(folder.corpus, index_path=folder.index)
    folder.corpus.write_text(kept)
    assert ids(folder.load(), "lake") == ["d"]
    assert set(os.listdir(folder.index)) == {"bm25.json", "terms-1"}


def test_a_running_server_outlives_a_rebuild(folder: Folder) -> None:
    folder.build(FOUR)
    before = folder.load()
    build_bm25(folder.corpus, index_path=folder.index)
    assert set(os.listdir(folder.index)) == {"bm25.json", "terms-2"}
    assert ids(before, "lake") == ids(folder.load(), "lake") == ["d"]


_BUILD = """
import sys
from pathlib import Path
from search_r1.search.bm25 import build_bm25
build_bm25(Path(sys.argv[1]), index_path=Path(sys.argv[2]), report=lambda *told: print(*told, flush=True))
"""


def test_killed_while_building_the_old_index_stands(folder: Folder) -> None:
    folder.build(FOUR)
    kept = folder.corpus.rename(folder.corpus.with_name("kept.jsonl"))
    write_corpus(folder.corpus, {str(row): f"passage number {row}" for row in range(20_000)})
    command = [sys.executable, "-c", _BUILD, str(folder.corpus), str(folder.index)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        builder.send_signal(signal.SIGKILL)
    assert set(os.listdir(folder.index)) == {"bm25.json", "lock", "terms-1", "terms-2"}
    large, folder.corpus = folder.corpus, kept
    assert ids(folder.load(), "lake") == ["d"]
    folder.corpus = large
    build_bm25(folder.corpus, index_path=folder.index)
    assert ids(folder.load(), "number 17", topk=1) == ["17"]
    assert set(os.listdir(folder.index)) == {"bm25.json", "terms-2"}


def test_two_builders_do_not_share_a_folder(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    write_corpus(corpus, PASSAGES)
    index = tmp_path / "bm25"
    with (
        lock_file(index / "lock", taken=RetrieverError("free")),
        pytest.raises(RetrieverError, match=r"another builder is at work on .*bm25; let it end"),
    ):
        build_bm25(corpus, index_path=index)
    build_bm25(corpus, index_path=index)
    assert "lock" not in [path.name for path in index.iterdir()]
    with pytest.raises(RetrieverError, match="cannot be written"):
        build_bm25(corpus, index_path=corpus / "bm25")

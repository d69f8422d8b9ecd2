from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from search_r1.search import corpus as corpus_module
from search_r1.search.corpus import JsonlCorpus
from search_r1.search.errors import RetrieverError

GOOD = '{"id": "0", "contents": "\\"Bolton\\"\\nA town."}'


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("last_newline", ["", "\n"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_rows_are_the_lines_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, last_newline: str
) -> None:
    monkeypatch.setattr(corpus_module, "_CHUNK_BYTES", chunk_bytes)
    contents = ["é\n漢字 🎬", "b" * 50, "c\u2028d"]
    lines = [
        json.dumps({"id": row, "contents": text}, ensure_ascii=False) for row, text in enumerate(contents)
    ]
    path = write(tmp_path / "corpus.jsonl", "\n".join(lines) + last_newline)
    corpus = JsonlCorpus(path)
    assert len(corpus) == 3
    assert [document.contents for document in corpus] == contents
    assert corpus[1].id == "1"
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(IndexError, match="row 3 of 3"):
        corpus[3]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "not JSON"),
        ('{"id": "1", "contents": "cut', "not JSON"),
        ('["1", "text"]', "JSON list"),
        ('{"id": "1", "text": "t"}', "'contents' is None"),
        ('{"id": "1", "contents": "  "}', "'contents' is '  '"),
        ('{"id": "1", "contents": ["t"]}', "'contents' is"),
        ('{"contents": "t"}', "'id' is None"),
        ('{"id": true, "contents": "t"}', "'id' is True"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path / "corpus.jsonl", f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(RetrieverError, match=r"corpus\.jsonl:2") as caught:
        JsonlCorpus(path).check_lines()
    assert complaint in str(caught.value)


def test_a_long_check_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(corpus_module, "_LINES_PER_REPORT", 2)
    caplog.set_level("INFO")
    JsonlCorpus(write(tmp_path / "corpus.jsonl", f"{GOOD}\n" * 5)).check_lines()
    assert [record.message.split(" of ")[0] for record in caplog.records] == ["checked 2", "checked 4"]


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"id": "1", "contents": "\xff"}\n')
    with pytest.raises(RetrieverError, match=r"corpus\.jsonl:2 is not JSON"):
        JsonlCorpus(path)[1]


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match=r"nowhere\.jsonl is not a file"):
        JsonlCorpus(tmp_path / "nowhere.jsonl")
    with pytest.raises(RetrieverError, match="is empty"):
        JsonlCorpus(write(tmp_path / "empty.jsonl", ""))

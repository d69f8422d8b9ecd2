from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest

from search_r1.search import line_offsets, sidecar
from search_r1.search.corpus import open_corpus, sample_rows
from search_r1.search.errors import RetrieverError

GOOD = '{"id": "0", "contents": "\\"Bolton\\"\\nA town."}'


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def with_sidecars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if every file were large."""
    monkeypatch.setattr(sidecar, "SIDECAR_FROM_BYTES", 0)
    monkeypatch.setattr(sidecar, "_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("last_newline", ["", "\n"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("sidecar_from", [0, 1 << 20])
def test_rows_are_the_lines_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, last_newline: str, sidecar_from: int
) -> None:
    monkeypatch.setattr(line_offsets, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(sidecar, "SIDECAR_FROM_BYTES", sidecar_from)
    contents = ["é\n漢字 🎬", "b" * 50, "c\u2028d"]
    lines = [
        json.dumps({"id": row, "contents": text}, ensure_ascii=False) for row, text in enumerate(contents)
    ]
    path = write(tmp_path / "corpus.jsonl", "\n".join(lines) + last_newline)
    corpus = open_corpus(path)
    assert len(corpus) == 3
    assert [document.contents for document in corpus] == contents
    assert corpus[1].id == "1"
    assert corpus.num_bytes == path.stat().st_size
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(IndexError, match="row 3 of 3"):
        corpus[3]
    assert path.with_name("corpus.jsonl.offsets.npy").exists() == (sidecar_from == 0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "not JSON"),
        ("   ", "not JSON"),
        ("Bolton is a town", "not JSON .*'Bolton is a town'"),
        ('{"id": "1", "contents": "cut', "not JSON"),
        ('{"id": "1", "contents": "a"} {"id": "2"}', "not JSON .*Extra data"),
        ('\ufeff{"id": "1", "contents": "a"}', "not JSON .*BOM"),
        ("[" * 5000 + "]" * 5000, "nested too deep"),
        ('["1", "text"]', "JSON list"),
        ('{"id": "1", "text": "t"}', r"no 'contents' among the keys \['id', 'text'\]"),
        ('{"id": "1", "contents": "  "}', "'contents' is '  '"),
        ('{"id": "1", "contents": ["t"]}', "'contents' is"),
        ('{"id": "1", "contents": null}', "'contents' is None"),
        ('{"contents": "t"}', "'id' is None"),
        ('{"id": true, "contents": "t"}', "'id' is True"),
        ('{"id": 1.5, "contents": "t"}', "'id' is 1.5"),
        ('{"id": "1", "contents": "a\\ud800"}', "'contents' is not valid Unicode at character 1"),
        ('{"id": "\\udfff", "contents": "a"}', "'id' is not valid Unicode"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path / "corpus.jsonl", f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(RetrieverError, match=rf"corpus\.jsonl:2.*{complaint}"):
        open_corpus(path).check()


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"id": "1", "contents": "\xff"}\n')
    with pytest.raises(RetrieverError, match=r"corpus\.jsonl:2 is not JSON"):
        open_corpus(path)[1]
    path.write_bytes(GOOD.encode("utf-16-le") + b"\n")
    with pytest.raises(RetrieverError, match=r"corpus\.jsonl:1 is not JSON"):
        open_corpus(path)[0]


def test_what_is_no_corpus_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match=r"nowhere\.jsonl is not a file"):
        open_corpus(tmp_path / "nowhere.jsonl")
    with pytest.raises(RetrieverError, match="is empty"):
        open_corpus(write(tmp_path / "empty.jsonl", ""))
    zipped = tmp_path / "corpus.jsonl.gz"
    zipped.write_bytes(gzip.compress(GOOD.encode()))
    with pytest.raises(RetrieverError, match=r"compressed.*gunzip"):
        open_corpus(zipped)
    table = pa.table({"id": ["0"], "contents": ["t"]})
    parquet.write_table(table, tmp_path / "corpus.parquet")
    with pytest.raises(RetrieverError, match=r"Parquet.*write_feather"):
        open_corpus(tmp_path / "corpus.parquet")


@pytest.mark.usefixtures("with_sidecars")
def test_the_second_opening_reads_no_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", f"{GOOD}\n" * 5)
    reports: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        reports.append((done, total))

    open_corpus(path, report=report).check(report)
    assert reports == [(path.stat().st_size, path.stat().st_size), (5, 5)]
    again = open_corpus(path, report=report)
    again.check(report)
    assert (len(again), len(reports)) == (5, 2)


@pytest.mark.usefixtures("with_sidecars")
def test_the_sidecar_of_another_content_is_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", f"{GOOD}\n" * 5)
    open_corpus(path).check()
    before = path.stat()
    # As long, and with the old time of change: the fingerprint tells.
    write(path, (f"{GOOD}\n" * 5).replace("Bolton", "Dalton"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    corpus = open_corpus(path)
    assert "Dalt" in corpus[4].contents
    write(path, f"{GOOD}\nno json\n")
    with pytest.raises(RetrieverError, match=r"corpus\.jsonl:2"):
        open_corpus(path).check()


@pytest.mark.usefixtures("with_sidecars")
@pytest.mark.parametrize("spoilt", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_sidecar_is_made_again(tmp_path: Path, spoilt: bytes) -> None:
    path = write(tmp_path / "corpus.jsonl", f"{GOOD}\n" * 5)
    open_corpus(path)
    kept = path.with_name("corpus.jsonl.offsets.npy")
    whole = kept.read_bytes()
    for damaged in (spoilt, whole[: len(whole) // 2], whole[:-8]):
        kept.write_bytes(damaged)
        assert len(open_corpus(path)) == 5
        assert kept.read_bytes() == whole
    assert sorted(child.name for child in tmp_path.iterdir()) == ["corpus.jsonl", kept.name]


@pytest.mark.usefixtures("with_sidecars")
def test_a_folder_that_cannot_be_written_has_its_offsets_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "corpus.jsonl", f"{GOOD}\n" * 5)
    kept = path.with_name("corpus.jsonl.offsets.npy")
    kept.mkdir()  # no file can take its place, not even as root
    assert len(open_corpus(path)) == 5
    assert caplog.messages == []  # nothing to worry about: there is another place
    (cached,) = (tmp_path / "cache" / "offsets").iterdir()
    assert len(np.load(cached)) == 7 + 6
    write(tmp_path / "file", "")
    for folder in (tmp_path / "file" / "cache", Path("~no-such-user/cache")):  # neither folder nor home
        monkeypatch.setattr(sidecar, "_CACHE", folder)
        caplog.clear()
        assert len(open_corpus(path)) == 5
        assert "stay in memory" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_an_arrow_file(tmp_path: Path, stream: bool) -> None:
    table = pa.table({"id": [7, 8, 9], "contents": ["é 漢字 🎬", "b", None]})
    path = tmp_path / "corpus.arrow"
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    corpus = open_corpus(path)
    assert len(corpus) == 3
    assert (corpus[0].id, corpus[0].contents) == ("7", "é 漢字 🎬")
    with pytest.raises(RetrieverError, match=r"corpus\.arrow: row 3: 'contents' is None"):
        corpus.check()
    with pytest.raises(IndexError):
        corpus[3]


def test_an_arrow_file_that_does_not_do_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.arrow"
    feather.write_feather(pa.table({"id": ["0"], "text": ["t"]}), path, compression="uncompressed")
    with pytest.raises(RetrieverError, match=r"lacks \['contents'\]"):
        open_corpus(path)
    texts = [f"text {row} " * 10 for row in range(50_000)]
    feather.write_feather(pa.table({"id": texts, "contents": texts}), path, compression="lz4")
    with pytest.raises(RetrieverError, match=r"compressed.*write_feather"):
        open_corpus(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RetrieverError, match="not readable as Arrow"):
        open_corpus(path)


def test_sampled_rows_are_evenly_spaced() -> None:
    assert sample_rows(3, size=10) == [0, 1, 2]
    assert sample_rows(21_015_324, size=3) == [0, 10507661, 21015323]


def test_damaged_arrow_texts_are_named_before_they_are_followed(tmp_path: Path) -> None:
    count = 2000
    columns = {"id": list(range(count)), "contents": [f"passage {row}" for row in range(count)]}
    path = tmp_path / "corpus.arrow"
    feather.write_feather(pa.table(columns), str(path), compression="uncompressed")
    content = bytearray(path.read_bytes())
    offsets = content.index(np.arange(0, 4 * len("passage 0"), len("passage 0"), dtype=np.int32).tobytes())
    content[offsets + 400 : offsets + 404] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(RetrieverError, match=r"column 'contents' is damaged"):
        open_corpus(path)
    feather.write_feather(pa.table(columns | {"id": [0.5] * count}), str(path), compression="uncompressed")
    with pytest.raises(RetrieverError, match=r"column 'id' has the type double, expected string"):
        open_corpus(path)

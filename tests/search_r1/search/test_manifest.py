from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.files import FileFacts, describe_file, fingerprint, list_changed_files
from search_r1.search.manifest import IndexManifest, load_manifest, locate_manifest, save_manifest


def make() -> IndexManifest:
    facts = FileFacts(bytes=3, fingerprint="f", sha256="s")
    return IndexManifest(
        kind="ivf_pq",
        parameters={"factory": "IVF16,PQ8"},
        retriever_name=None,
        encoder="intfloat/e5-base-v2",
        encoder_sha256="e",
        pooling="mean",
        query_prefix="",
        passage_prefix="为这个句子: ",
        max_length=256,
        dim=768,
        normalized=True,
        corpus=facts,
        count=5,
        files={"a.index": facts},
        faiss_version="1.15.1",
        built_with="0.1.0",
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dim": "768"}, "dim"),
        ({"version": 1}, "version"),
        ({"corpus": {"bytes": 3}}, "corpus.fingerprint"),
        ({"files": {"../a": {"bytes": 3, "fingerprint": "f", "sha256": "s"}}}, "files"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    path = locate_manifest(tmp_path / "a.index")
    save_manifest(make(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RetrieverError, match=rf"a\.index\.manifest\.json is malformed: {complaint}.*rebuild"):
        load_manifest(tmp_path / "a.index")
    path.write_text("no json")
    with pytest.raises(RetrieverError, match=r"malformed: the whole: .*rebuild"):
        load_manifest(tmp_path / "a.index")


def test_changed_files_are_listed(tmp_path: Path) -> None:
    for name in ("longer", "missing", "other", "same"):
        (tmp_path / name).write_text("abc")
    files = {path.name: describe_file(path) for path in sorted(tmp_path.iterdir())}
    (tmp_path / "longer").write_text("abcd")
    (tmp_path / "other").write_text("abd")
    (tmp_path / "missing").unlink()
    problems = list_changed_files(files, tmp_path)
    expected = ["files.longer.bytes", "files.missing", "files.other.fingerprint"]
    assert [problem.split(": ")[0] for problem in problems] == expected


def test_a_fingerprint_reads_little_and_notices_changes_where_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = 64 << 20
    with path.open("wb") as file:
        file.truncate(size)
    before, facts = fingerprint(path), describe_file(path)
    for position, is_seen in ((0, True), (size - 1, True), (size // 2, True), (size // 2 + 10_000, False)):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"x")
        assert (fingerprint(path) != before) == is_seen
        assert list_changed_files({"large": facts}, tmp_path, full=True) != []
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"\0")

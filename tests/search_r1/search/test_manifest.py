from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.fingerprint import FileFacts, describe_file
from search_r1.search.manifest import IndexManifest, list_changed_files, load_manifest, locate_manifest


def make(**changes: object) -> IndexManifest:
    facts = {
        "version": 2,
        "kind": "ivf_pq",
        "parameters": {"num_lists": 16, "rescore_storage": "sq8"},
        "retriever_name": None,
        "encoder": "intfloat/e5-base-v2",
        "encoder_sha256": "e",
        "pooling": "mean",
        "query_prefix": "",
        "passage_prefix": "为这个句子: ",
        "max_length": 256,
        "dim": 768,
        "metric": "inner_product",
        "normalised": True,
        "corpus": FileFacts(bytes=3, fingerprint="f", sha256="s"),
        "count": 5,
        "files": {"a.index": FileFacts(bytes=1, fingerprint="f", sha256="s")},
        "faiss_version": "1.15.1",
        "built_with": "0.1.0",
    }
    return IndexManifest(**(facts | changes))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    make().save(tmp_path / "a.index")
    assert load_manifest(tmp_path / "a.index") == make()
    assert load_manifest(tmp_path / "b.index") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.index.manifest.json"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dim": None}, "'dim' is None"),
        ({"dim": "768"}, "'dim' is '768'"),
        ({"version": 1}, "version 1, not 2; rebuild"),
        ({"corpus": {"bytes": 3}}, "'corpus' is"),
        (
            {"files": {"a.index": {"bytes": "3", "fingerprint": "f", "sha256": "s"}}},
            "'files.a.index.bytes' is '3'",
        ),
        ({"files": {"../a": {"bytes": 3, "fingerprint": "f", "sha256": "s"}}}, "bare file name"),
        ({"surprise": 1}, "'surprise' is unknown"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    make().save(tmp_path / "a.index")
    path = locate_manifest(tmp_path / "a.index")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RetrieverError, match=r"a\.index\.manifest\.json") as caught:
        load_manifest(tmp_path / "a.index")
    assert complaint in str(caught.value)


@pytest.mark.parametrize("text", ["no json", "[]", '{"dim": 3}', '{"version": 2}', ""])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    locate_manifest(tmp_path / "a.index").write_text(text)
    with pytest.raises(RetrieverError, match=r"a\.index\.manifest\.json.*rebuild the index"):
        load_manifest(tmp_path / "a.index")


def test_changed_files_are_listed(tmp_path: Path) -> None:
    for name in ("same", "longer", "other", "missing"):
        (tmp_path / name).write_text("abc")
    manifest = make(files={path.name: describe_file(path) for path in sorted(tmp_path.iterdir())})
    (tmp_path / "longer").write_text("abcd")
    (tmp_path / "other").write_text("abd")
    (tmp_path / "missing").unlink()
    problems = list_changed_files(manifest, tmp_path / "same")
    assert [problem.split(": ")[0] for problem in problems] == [
        "files.longer.bytes",
        "files.missing",
        "files.other.fingerprint",
    ]


def test_a_renamed_index_and_vectors_that_are_not_its_own_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    manifest = make(files={"a": describe_file(tmp_path / "a")})
    assert list_changed_files(manifest, tmp_path / "a") == []
    (tmp_path / "a.vectors").write_text("of another index")
    assert list_changed_files(manifest, tmp_path / "a") == [
        "files.a.vectors: index was built without such a file, found one; take it away"
    ]
    assert list_changed_files(manifest, tmp_path / "b") == [
        "files: ['a'] were built, not b; give it its name again"
    ]

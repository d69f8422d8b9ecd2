from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections import namedtuple
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import download
import pytest
from download import DownloadError
from huggingface_hub import constants
from rich.console import Console

from tests.scripts.fake_hub import ARCHIVE, CORPUS, CORPUS_REPO, INDEX, INDEX_REPO, PARTS, FakeHub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(fake := FakeHub()):
        yield fake


def run(hub: FakeHub, folder: Path, *flags: str) -> str:
    settings = download.parse_arguments(["--save_path", str(folder), "--endpoint", hub.url, *flags])
    shown = StringIO()
    download.download(settings, console=Console(file=shown, width=300))
    return shown.getvalue()


def fail(hub: FakeHub, folder: Path, *flags: str) -> str:
    with pytest.raises(DownloadError) as caught:
        run(hub, folder, *flags)
    return str(caught.value)


def test_fetches_joins_and_unpacks_once(hub: FakeHub, tmp_path: Path) -> None:
    shown = run(hub, tmp_path)
    index = tmp_path / "wiki-18-e5_Flat.index"
    assert index.read_bytes() == INDEX
    assert (tmp_path / "wiki-18.jsonl").read_bytes() == CORPUS
    names = {path.name for path in tmp_path.iterdir()}
    made = {"wiki-18-e5_Flat.index", "wiki-18.jsonl"}
    assert names == made | {f"{name}.source.json" for name in made} | {".download.lock"}
    assert "wiki-18-e5_Flat.index: 600,003 bytes, checked" in shown
    num_bytes = hub.num_bytes
    assert run(hub, tmp_path).count("already there") == 2
    assert run(hub, tmp_path, "--verify").count("verified") == 2
    assert hub.num_bytes == num_bytes
    index.write_bytes(INDEX[:-1] + b"x")
    assert "the hash of wiki-18-e5_Flat.index is" in fail(hub, tmp_path, "--verify")
    assert "expected {'repo'" in fail(hub, tmp_path, "--index_files", "part_ab")
    hub.url = "http://127.0.0.1:9"
    assert run(hub, tmp_path).count("already there") == 2


def test_a_corpus_that_is_there_and_wrong_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    corpus = tmp_path / "wiki-18.jsonl"
    corpus.write_bytes(CORPUS)
    assert "without a record" in fail(hub, tmp_path, "--what", "corpus")
    given = ("--sha256", f"wiki-18.jsonl={hashlib.sha256(CORPUS).hexdigest()}")
    assert "checked" in run(hub, tmp_path, "--what", "corpus", *given)
    corpus.write_bytes(CORPUS[:-1])
    assert "bytes, expected" in fail(hub, tmp_path, "--what", "corpus")
    corpus.write_bytes(CORPUS[:-1] + b"x")
    assert "the hash of wiki-18.jsonl is" in fail(hub, tmp_path, "--what", "corpus", "--verify")


def test_another_run_continues_where_the_first_one_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.corrupt = "part_ab"
    assert "the hash of part_ab is" in fail(hub, tmp_path, "--what", "index")
    (partial,) = tmp_path.glob("*.partial")
    assert partial.read_bytes() == PARTS[0]
    with partial.open("ab") as file:
        file.write(b"half of the next")  # as a kill leaves it
    num_bytes = hub.num_bytes
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert hub.num_bytes - num_bytes == len(PARTS[1])


@pytest.mark.parametrize(("what", "name"), [("corpus", "wiki-18.jsonl"), ("index", "wiki-18-e5_Flat.index")])
def test_a_run_that_ends_before_its_record_is_written_is_continued(
    hub: FakeHub, tmp_path: Path, what: str, name: str
) -> None:
    record = tmp_path / f"{name}.source.json"
    record.mkdir()
    with pytest.raises(IsADirectoryError):
        run(hub, tmp_path, "--what", what)
    record.rmdir()
    num_bytes = hub.num_bytes
    assert "checked" in run(hub, tmp_path, "--what", what)
    assert (tmp_path / name).read_bytes() == {"corpus": CORPUS, "index": INDEX}[what]
    assert hub.num_bytes == num_bytes


def test_a_connection_that_breaks_is_resumed(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after = 100_000
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert hub.num_bytes <= len(INDEX) + 100_000


def test_other_repositories_and_names(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"me/mine/a": b"first,", "me/mine/c": b"second", "me/texts/passages.jsonl": CORPUS}
    flags = "--index_repo me/mine --index_name my.index --corpus_repo me/texts --corpus_file passages.jsonl"
    run(hub, tmp_path, *flags.split(), "--index_files", "a", "c")
    assert (tmp_path / "my.index").read_bytes() == b"first,second"
    assert (tmp_path / "passages.jsonl").read_bytes() == CORPUS


def test_what_the_hub_lacks_or_refuses_is_named(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub.files[f"{INDEX_REPO}/part_ab"]
    assert "no such file; check the file name" in fail(hub, tmp_path, "--what", "index")
    hub.files[f"{CORPUS_REPO}/wiki-18.jsonl.gz"] = ARCHIVE[: len(ARCHIVE) // 2]
    assert "cannot be unpacked" in fail(hub, tmp_path / "b", "--what", "corpus")
    assert not (tmp_path / "b" / "wiki-18.jsonl").exists()
    hub.files[f"{CORPUS_REPO}/wiki-18.jsonl.gz"] = ARCHIVE
    hub.token = "hf_geheim"
    assert "set HF_TOKEN" in fail(hub, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    assert "hf_geheim" not in run(hub, tmp_path, "--what", "corpus")
    hub.url = "http://127.0.0.1:9"
    assert "check the network and --endpoint" in fail(hub, tmp_path, "--what", "index")


def test_without_a_hash_one_has_to_be_given(hub: FakeHub, tmp_path: Path) -> None:
    hub.has_hashes = False
    assert "--sha256 part_aa=" in fail(hub, tmp_path, "--what", "index")
    assert "not checked" in run(hub, tmp_path, "--what", "index", "--allow_unchecked")
    typo = ("--sha256", f"part_a={'0' * 64}")
    assert "--sha256 part_a: expected one of part_aa" in fail(hub, tmp_path, "--what", "index", *typo)
    wrong = ("--sha256", f"wiki-18-e5_Flat.index={'0' * 64}")
    assert "expected 0000" in fail(hub, tmp_path, "--what", "index", "--allow_unchecked", *wrong)
    assert "is no SHA-256" in fail(hub, tmp_path, "--sha256", "part_aa=abc")


def test_too_little_room_and_a_second_run_are_named_before_anything_is_loaded(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / ".download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another download is running" in fail(hub, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    assert "1.0 kB free, expected about" in fail(hub, tmp_path)
    assert hub.num_bytes == 0

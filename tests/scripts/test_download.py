from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import download
import pytest
from hub import DownloadError
from rich.console import Console

from tests.scripts.fake_hub import (
    ARCHIVE,
    CORPUS,
    CORPUS_REPO,
    INDEX,
    INDEX_REPO,
    PARTS,
    FakeHub,
    Fault,
    serving,
)

TOKEN = "hf_geheim"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving(fake := FakeHub()):
        yield fake


def run(hub: FakeHub, folder: Path, *flags: str, token: str | None = None) -> str:
    """What was said. Retries wait for milliseconds."""
    settings = download.parse_arguments(
        ["--save_path", str(folder), "--endpoint", hub.url, "--retries", "4", "--timeout", "5", *flags]
    )
    said = StringIO()
    download.download(settings, token=token, console=Console(file=said, width=300), pause_s=0.001)
    return said.getvalue()


def fail(hub: FakeHub, folder: Path, *flags: str, token: str | None = None) -> str:
    with pytest.raises(DownloadError) as caught:
        run(hub, folder, *flags, token=token)
    return str(caught.value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".download.lock"}


@pytest.mark.parametrize("is_redirecting", [True, False])
def test_fetches_joins_and_unpacks_once(hub: FakeHub, tmp_path: Path, is_redirecting: bool) -> None:
    hub.is_redirecting = is_redirecting
    said = run(hub, tmp_path)
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert (tmp_path / "wiki-18.jsonl").read_bytes() == CORPUS
    assert names(tmp_path) == {"wiki-18-e5_Flat.index", "wiki-18.jsonl", "download.json"}
    assert "wiki-18-e5_Flat.index: 600,003 bytes, checked" in said
    num_asked = len(hub.asked)
    # The next two commands of the published README, which are for parts and an archive.
    subprocess.run("cat part_* > e5_Flat.index; gzip -d wiki-18.jsonl.gz", shell=True, cwd=tmp_path)
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert (tmp_path / "wiki-18.jsonl").read_bytes() == CORPUS
    said = run(hub, tmp_path)
    assert len(hub.asked) == num_asked  # not even a look
    assert said.count("there already") == 2


def test_one_of_both(hub: FakeHub, tmp_path: Path) -> None:
    run(hub, tmp_path, "--what", "corpus", "--keep_archive")
    assert names(tmp_path) == {"wiki-18.jsonl", "wiki-18.jsonl.gz", "download.json"}
    run(hub, tmp_path, "--what", "index")
    assert json.loads((tmp_path / "download.json").read_text()).keys() == {
        "wiki-18.jsonl",
        "wiki-18-e5_Flat.index",
    }


def test_other_repositories_and_names(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"me/mine/a%20b": b"first,", "me/mine/c": b"second", "me/texts/passages.jsonl": CORPUS}
    hub.is_redirecting = False
    flags = "--index_repo me/mine --index_name my.index --corpus_repo me/texts --corpus_file passages.jsonl"
    run(hub, tmp_path, *flags.split(), "--index_files", "a b", "c")
    assert (tmp_path / "my.index").read_bytes() == b"first,second"
    assert (tmp_path / "passages.jsonl").read_bytes() == CORPUS


@pytest.mark.parametrize(
    "fault",
    [
        Fault(break_after=100_000),
        Fault(break_after=0),
        Fault(announces=1_000_000),  # more than there is: the connection ends in the middle
        Fault(announces=1000),  # less than there is
        Fault(content_range="bytes 7-300000/300001"),
        Fault(content_range="nonsense"),
        Fault(status=500),
        Fault(status=503, headers={"Retry-After": "0"}),
        Fault(status=429),
        Fault(status=408),
        Fault(status=416),
        Fault(content=PARTS[0][:1000]),  # a short file with an honest length
        Fault(excess=b"more than announced by HEAD"),
        Fault(method="HEAD", status=503),
    ],
)
def test_what_goes_wrong_once_ends_in_the_right_file(hub: FakeHub, tmp_path: Path, fault: Fault) -> None:
    hub.faults = [fault]
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert not hub.faults


def test_a_connection_that_keeps_breaking_still_gets_there_without_loading_twice(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.faults = [Fault(break_after=30_000, is_lasting=True)]
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert hub.num_bytes == len(INDEX)


def test_a_server_that_ignores_ranges(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [Fault(break_after=100_000), Fault(ignores_range=True, is_lasting=True)]
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX


def test_a_server_that_ignores_ranges_and_breaks_off_ends_with_its_name(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [Fault(ignores_range=True, break_after=100_000, is_lasting=True)]
    said = fail(hub, tmp_path, "--what", "index")
    assert re.search(r"part_aa: http.*gave up after 4 attempts without progress; run again", said)


def test_silence_is_not_waited_for(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [Fault(hangs_s=1.0)]
    run(hub, tmp_path, "--what", "index", "--timeout", "0.2")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX


@pytest.mark.parametrize("break_after", [0, 100_000, 299_999])
def test_another_run_goes_on_where_the_first_one_stopped(
    hub: FakeHub, tmp_path: Path, break_after: int
) -> None:
    hub.faults = [
        Fault(break_after=break_after, file="part_ab"),
        *[Fault(status=503, file="part_ab") for _ in range(4)],
    ]
    assert "part_ab" in fail(hub, tmp_path, "--what", "index")
    assert names(tmp_path) == {"wiki-18-e5_Flat.index.partial", "wiki-18-e5_Flat.index.partial.json"}
    assert (tmp_path / "wiki-18-e5_Flat.index.partial").stat().st_size == len(PARTS[0]) + break_after
    hub.faults.clear()
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert hub.num_bytes == len(INDEX)
    assert names(tmp_path) == {"wiki-18-e5_Flat.index", "download.json"}


def test_what_another_file_left_behind_is_not_built_upon(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [Fault(break_after=200_000), Fault(status=503, is_lasting=True)]
    fail(hub, tmp_path, "--what", "index")
    hub.faults.clear()
    hub.files[f"{INDEX_REPO}/part_aa"] = b"a new version" * 50_000
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == b"a new version" * 50_000 + PARTS[1]


@pytest.mark.parametrize("damage", ["flipped", "longer", "no notes", "torn notes"])
def test_a_damaged_beginning_is_noticed(hub: FakeHub, tmp_path: Path, damage: str) -> None:
    hub.faults = [Fault(break_after=200_000), Fault(status=503, is_lasting=True)]
    fail(hub, tmp_path, "--what", "index")
    hub.faults.clear()
    partial, notes = (
        tmp_path / "wiki-18-e5_Flat.index.partial",
        tmp_path / "wiki-18-e5_Flat.index.partial.json",
    )
    if damage == "flipped":
        partial.write_bytes(bytes(partial.read_bytes()[:-1]) + b"\0\0")
    elif damage == "longer":
        partial.write_bytes(b"\0" * 5_000_000)
    elif damage == "no notes":
        notes.unlink()
    else:
        notes.write_text('{"sour')
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX


def test_a_wrong_hash_names_file_value_and_expectation(hub: FakeHub, tmp_path: Path) -> None:
    evil = b"evil" * 75_000 + b"!"
    hub.faults = [Fault(content=evil, is_lasting=True, file="part_aa")]
    said = fail(hub, tmp_path, "--what", "index")
    assert said.startswith("part_aa: the sha256 of what http")
    assert hashlib.sha256(evil).hexdigest() in said
    assert hashlib.sha256(PARTS[0]).hexdigest() in said
    assert "run again" in said
    assert "wiki-18-e5_Flat.index" not in names(tmp_path)
    assert (tmp_path / "wiki-18-e5_Flat.index.partial").stat().st_size == 0
    hub.faults.clear()
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(status=404, method="HEAD"), r"part_aa: http.* answered 404: expected a file there; check"),
        (Fault(status=401, method="HEAD"), r"part_aa: http.* answered 401: no token was sent; .*HF_TOKEN"),
        (Fault(status=403), r"part_aa: http.* answered 403: .*HF_TOKEN"),
        (Fault(status=418), r"part_aa: http.* answered 418, expected 200"),
        (Fault(status=503, is_lasting=True), r"part_aa: http.* answered 503; gave up after 4 attempts"),
        (Fault(status=429, headers={"Retry-After": "86400"}), r"part_aa: http.* answered 429; gave up"),
        (
            Fault(announces=77, is_lasting=True),
            r"part_aa: http.* announces 77 bytes, expected 300001; gave up",
        ),
        (Fault(excess=b"x", is_lasting=True), r"part_aa: http.* announces 300002 bytes, expected 300001"),
        (
            Fault(content_range="bytes 5-9/10", is_lasting=True),
            r"part_aa: http.* sent Content-Range 'bytes 5-9/10', expected 'bytes 0-300000/300001'",
        ),
    ],
)
def test_what_lasts_is_named(hub: FakeHub, tmp_path: Path, fault: Fault, expected: str) -> None:
    fault.file = "part_aa"
    hub.faults = [fault]
    assert re.match(expected, fail(hub, tmp_path, "--what", "index"))
    assert "wiki-18-e5_Flat.index" not in names(tmp_path)
    hub.faults.clear()
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX


def test_a_dead_endpoint_is_named(tmp_path: Path) -> None:
    assert "http://127.0.0.1:9/datasets/" in fail(FakeHub(url="http://127.0.0.1:9"), tmp_path)
    assert "expected something like https://host" in fail(FakeHub(url="localhost"), tmp_path)


def test_a_token_opens_and_is_not_shown(hub: FakeHub, tmp_path: Path) -> None:
    hub.token, hub.is_redirecting = TOKEN, False
    said = fail(hub, tmp_path, token="hf_falsch")
    assert "the token in HF_TOKEN does not open it" in said
    assert "falsch" not in said
    run(hub, tmp_path, token=TOKEN)
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert all(TOKEN.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    assert "one line of ASCII" in fail(hub, tmp_path, token="hf_\nx")


def test_without_a_hash_one_has_to_be_given(hub: FakeHub, tmp_path: Path) -> None:
    hub.has_hashes = False
    said = fail(hub, tmp_path, "--what", "index")
    assert "names no hash" in said
    assert "--sha256 part_aa=" in said
    given = [
        f"--sha256=part_a{c}={hashlib.sha256(part).hexdigest()}" for c, part in zip("ab", PARTS, strict=True)
    ]
    run(hub, tmp_path, "--what", "index", *given)
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    run(hub, tmp_path / "unchecked", "--what", "index", "--allow_unchecked")
    assert (tmp_path / "unchecked" / "wiki-18-e5_Flat.index").read_bytes() == INDEX


def test_a_checksum_file_speaks_for_parts_and_results(hub: FakeHub, tmp_path: Path) -> None:
    sums = tmp_path / "SHA256SUMS"
    right = {"wiki-18-e5_Flat.index": INDEX, "part_aa": PARTS[0], "wiki-18.jsonl": CORPUS}
    sums.write_text("".join(f"{hashlib.sha256(c).hexdigest()}  ./{name}\n" for name, c in right.items()))
    run(hub, tmp_path / "a", "--checksums", str(sums))
    for name in ("wiki-18-e5_Flat.index", "wiki-18.jsonl", "part_ab"):
        said = fail(hub, tmp_path / name, "--sha256", f"{name}={'0' * 64}")
        assert name in said
        assert "expected " + "0" * 64 in said
    assert "--checksums /no/where cannot be read" in fail(hub, tmp_path / "b", "--checksums", "/no/where")
    assert "is no SHA-256; expected 64" in fail(hub, tmp_path / "b", "--sha256", "part_aa=123")


def test_small_files_have_gits_hash(hub: FakeHub, tmp_path: Path) -> None:
    git = hashlib.sha1(b"blob %d\0" % len(PARTS[0]) + PARTS[0]).hexdigest()
    small = {"Content-Length": str(len(PARTS[0])), "ETag": f'"{git}"'}
    hub.faults = [Fault(method="HEAD", status=200, headers=small, file="part_aa")]
    run(hub, tmp_path, "--what", "index")
    assert json.loads((tmp_path / "download.json").read_text())["wiki-18-e5_Flat.index"]["pieces"][0][
        "digest"
    ] == {
        "kind": "git-sha1",
        "value": git,
    }


def test_renamed_repositories_are_followed(hub: FakeHub, tmp_path: Path) -> None:
    moved = {"Location": f"/datasets/{INDEX_REPO}/resolve/main/part_aa"}
    hub.faults = [Fault(method="HEAD", status=307, headers=moved, file="old/name/resolve/main/part_aa")]
    hub.files["old/name/part_aa"] = PARTS[0]
    run(hub, tmp_path, "--what", "index", "--index_repo", "old/name", "--index_files", "part_aa")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == PARTS[0]


@pytest.mark.parametrize(
    "content", [b"", ARCHIVE[:-9], b"no gzip at all", ARCHIVE[:5000] + b"\0" + ARCHIVE[5001:]]
)
def test_a_broken_archive_is_named(hub: FakeHub, tmp_path: Path, content: bytes) -> None:
    hub.files[f"{CORPUS_REPO}/wiki-18.jsonl.gz"] = content
    said = fail(hub, tmp_path, "--what", "corpus")
    assert re.search(
        r"wiki-18\.jsonl\.gz cannot be unpacked \(.+\); expected a whole gzip file: delete it", said
    )
    assert names(tmp_path) == {"wiki-18.jsonl.gz"}


def test_an_archive_that_is_there_is_not_loaded_again(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "wiki-18.jsonl.gz").write_bytes(ARCHIVE)
    (tmp_path / "wiki-18.jsonl.partial").write_bytes(b"an interrupted unpacking")
    run(hub, tmp_path, "--what", "corpus")
    assert (tmp_path / "wiki-18.jsonl").read_bytes() == CORPUS
    assert hub.count("GET") == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "wiki-18.jsonl.gz").write_bytes(b"\0" * len(ARCHIVE))
    run(hub, tmp_path / "other", "--what", "corpus")
    assert (tmp_path / "other" / "wiki-18.jsonl").read_bytes() == CORPUS


def test_a_file_from_elsewhere_is_checked_and_kept(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "wiki-18-e5_Flat.index").write_bytes(INDEX)
    run(hub, tmp_path, "--what", "index")
    assert hub.count("GET") == 0
    for content, complaint in [
        (INDEX[:-1], "has 600,002 bytes, expected 600,003"),
        (INDEX[:-1] + b"\0", "the sha256 of part_ab is "),
    ]:
        other = tmp_path / complaint[:8]
        other.mkdir()
        (other / "wiki-18-e5_Flat.index").write_bytes(content)
        said = fail(hub, other, "--what", "index")
        assert complaint in said
        assert "delete it or choose another --save_path" in said
        assert (other / "wiki-18-e5_Flat.index").read_bytes() == content
    (tmp_path / "wiki-18.jsonl").write_bytes(CORPUS)
    assert "download.json says nothing of it" in fail(hub, tmp_path, "--what", "corpus")


def test_finished_files_are_verified_on_request(hub: FakeHub, tmp_path: Path) -> None:
    run(hub, tmp_path)
    assert run(hub, tmp_path, "--verify").count("verified") == 2
    with (tmp_path / "wiki-18.jsonl").open("r+b") as stream:
        stream.write(b"[")
    run(hub, tmp_path)
    said = fail(hub, tmp_path, "--verify")
    assert re.search(r"wiki-18\.jsonl: the sha256 of wiki-18\.jsonl is .*, expected .* delete it", said)
    (tmp_path / "wiki-18-e5_Flat.index").write_bytes(b"short")
    assert "has 5 bytes, expected 600,003" in fail(hub, tmp_path, "--what", "index")
    assert "was made of PeterJinGo" in fail(hub, tmp_path, "--what", "index", "--index_repo", "me/mine")


def test_too_little_room_is_said_before_anything_is_loaded(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    said = fail(hub, tmp_path, "--what", "index")
    assert re.search(r"e5_Flat\.index: .* has 500\.0 kB free, expected 600\.0 kB; make room", said)
    assert hub.count("GET") == 0


def test_two_runs_do_not_write_into_the_same_files(hub: FakeHub, tmp_path: Path) -> None:
    with (tmp_path / ".download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another download is running" in fail(hub, tmp_path)
    run(hub, tmp_path)


def test_the_command_says_what_is_wrong_and_fails(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--save_path", str(tmp_path), "--endpoint", hub.url]
    assert download.main([*flags, "--index_files", "part_zz", "--what", "index"]) == 1
    assert "part_zz: http" in capsys.readouterr().err
    assert download.main(flags) == 0
    assert "checked" in capsys.readouterr().err


def test_a_killed_run_loses_nothing(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [Fault(stalls_after=200_000, file="part_ab")]
    flags = ["--save_path", str(tmp_path), "--endpoint", hub.url, "--what", "index"]
    process = subprocess.Popen([sys.executable, download.__file__, *flags], stderr=subprocess.DEVNULL)
    partial = tmp_path / "wiki-18-e5_Flat.index.partial"
    while not partial.is_file() or partial.stat().st_size < len(PARTS[0]) + 100_000:
        time.sleep(0.01)
    process.kill()
    process.wait()
    size = partial.stat().st_size
    loaded = hub.num_bytes
    run(hub, tmp_path, "--what", "index")
    assert (tmp_path / "wiki-18-e5_Flat.index").read_bytes() == INDEX
    assert hub.num_bytes - loaded == len(INDEX) - size


def test_a_folder_that_cannot_be_one_is_named(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert re.search(r"file.*; choose another --save_path", fail(hub, tmp_path / "file" / "deep"))

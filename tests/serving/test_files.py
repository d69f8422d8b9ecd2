from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.files import lock_file, replacing_file, sha256_of_file, write_atomically, write_json_atomically


def test_the_hash_covers_the_file_or_its_beginning(tmp_path: Path) -> None:
    path, content = tmp_path / "file", b"abc" * 3_000_000
    path.write_bytes(content)
    progress: list[tuple[int, int]] = []
    assert sha256_of_file(path, on_progress=lambda *bytes_: progress.append(bytes_)) == digest(content)
    assert progress[-1] == (9_000_000, 9_000_000)
    for size in (0, 5_000_001, 10_000_000):
        assert sha256_of_file(path, max_bytes=size) == digest(content[:size])


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, "first \ud800")
    assert path.read_text() == "first \\ud800"
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    with pytest.raises(KeyError), replacing_file(path) as partial, partial.open("w") as file:
        print({}["gone"], file=file)
    assert path.read_bytes() == b"\xff"
    write_json_atomically(path, {"é": [1]})
    assert json.loads(path.read_bytes()) == {"é": [1]}
    assert os.listdir(path.parent) == ["file"]


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    # Opening the temporary file opens a device that is always full.
    (tmp_path / f".file.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_lock_is_held_by_one_at_a_time_and_free_after_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    taken = ValueError("taken")
    with lock_file(path, taken=taken), pytest.raises(ValueError, match="taken"), lock_file(path, taken=taken):
        pass
    with lock_file(path, taken=taken):
        pass


REMOVED_MEANWHILE = """
import os, sys
from pathlib import Path
from serving.files import lock_file

path, opened = Path(sys.argv[1]), []

def remove_before_the_first_lock(event, arguments):
    if event == "fcntl.flock" and not opened:
        opened.append(event)
        path.unlink()
        path.parent.rmdir()

sys.addaudithook(remove_before_the_first_lock)
with lock_file(path, taken=ValueError("taken")):
    print(path.read_text() == str(os.getpid()))
    try:
        with lock_file(path, taken=ValueError("taken")):
            print("locked twice")
    except ValueError as error:
        print(error)
"""


def test_a_lock_that_its_holder_removed_is_not_the_lock(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", REMOVED_MEANWHILE, str(tmp_path / "work" / "lock")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.communicate()[0] == f"True\ntaken (process {child.pid})\n"

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.online.store import AnswerKey, OnlineStore

SPENDER = """
import asyncio, sys
from pathlib import Path
from search_r1.search.online.store import OnlineStore

async def main():
    store = OnlineStore(Path(sys.argv[1]), read_only=False)
    sent = 0
    while await store.count_request(limit=300):
        sent += 1
    print(sent)
    await store.aclose()

asyncio.run(main())
"""


async def test_a_limit_is_kept_exactly_by_several_processes(tmp_path: Path) -> None:
    """They also make the file, all at once."""
    path = tmp_path / "s.sqlite"
    spenders = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", SPENDER, str(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    counts = []
    for spender in spenders:
        out, err = await spender.communicate()
        assert spender.returncode == 0, err.decode()
        counts.append(int(out))
    assert sum(counts) == 300
    store = OnlineStore(path, read_only=True)
    assert await store.num_requests() == 300
    await store.aclose()


RECORDER = """
import asyncio, sys
from pathlib import Path
from search_r1.search.online.store import AnswerKey, OnlineStore
from search_r1.search.retriever import Hit
from search_r1.search.schema import Document

async def main():
    store = OnlineStore(Path(sys.argv[1]), read_only=False)
    for query in ("first", "second"):
        hits = (Hit(document=Document(id=query, contents=query), score=1.0),)
        await store.keep(AnswerKey(source="serper", query=query, topk=3, date="2025-01-31"), hits)
        print("recorded", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    await store.aclose()

asyncio.run(main())
"""


async def test_a_recording_is_replayed_while_another_process_records(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    keys = [
        AnswerKey(source="serper", query=query, topk=3, date="2025-01-31") for query in ("first", "second")
    ]
    recorder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RECORDER, str(path), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert recorder.stdin is not None
    assert recorder.stdout is not None
    assert await recorder.stdout.readline() == b"recorded\n"
    reader = OnlineStore(path, read_only=True)
    found = [await reader.find(key) for key in keys]
    recorder.stdin.write(b"\n")
    assert await recorder.stdout.readline() == b"recorded\n"
    found.append(await reader.find(keys[1]))
    assert [hits and hits[0].document.id for hits in found] == ["first", None, "second"]
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        await reader.keep(keys[0], ())
    recorder.stdin.write(b"\n")
    assert await recorder.wait() == 0
    assert (await reader.find(keys[0])) == found[0]
    await reader.aclose()


@pytest.mark.parametrize("kind", ["text", "other database", "folder", "newer"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_something_else_is_refused_and_left_alone(
    kind: str, read_only: bool, tmp_path: Path
) -> None:
    path = tmp_path / "s.sqlite"
    if kind == "text":
        path.write_text("no database\n" * 100)
    elif kind == "folder":
        path.mkdir()
    else:
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE mine (a)" if kind == "other database" else "PRAGMA user_version = 9")
        database.close()
    with pytest.raises(RetrieverError, match=r"--online_cache .*s\.sqlite"):
        OnlineStore(path, read_only=read_only)
    if kind == "text":
        assert path.read_text() == "no database\n" * 100


def test_a_missing_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match=r"none\.sqlite is not a file; record one first"):
        OnlineStore(tmp_path / "none.sqlite", read_only=True)
    assert not list(tmp_path.iterdir())

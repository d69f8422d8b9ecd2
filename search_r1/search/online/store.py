"""One SQLite file per project: recorded answers, and the number of requests. Several processes may share it.

It must be on a local disk: the write-ahead log does not work over network file systems. A recording in a
read-only folder can still be replayed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from search_r1.search.errors import RetrieverError
from search_r1.search.online.options import ANY_DATE
from search_r1.search.retriever import Found, Hit
from search_r1.search.schema import Document
from serving.encoding import replace_surrogates

T = TypeVar("T")

_VERSION = 2
_BUSY_S = 30.0
_SCHEMA = (
    "CREATE TABLE answers (source TEXT NOT NULL, query TEXT NOT NULL, topk INTEGER NOT NULL,"
    " date TEXT NOT NULL, asked_at TEXT NOT NULL, hits TEXT NOT NULL,"
    " PRIMARY KEY (source, query, topk, date)) WITHOUT ROWID",
    "CREATE TABLE requests (total INTEGER NOT NULL)",
    "INSERT INTO requests VALUES (0)",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerKey:
    """What an answer depends on."""

    source: str
    """The engine's name, and its URL where that is not the published one."""
    query: str
    """Normalized."""
    topk: int
    date: str
    """`YYYY-MM-DD`, or `any` to look up the newest."""


def normalize_query(query: str) -> str:
    """Return one spelling of the same query: NFC, no lone surrogates, single spaces; case is kept."""
    return " ".join(unicodedata.normalize("NFC", replace_surrogates(query)).split())


def today() -> str:
    """Return the date in UTC."""
    return datetime.now(UTC).date().isoformat()


class OnlineStore:
    """The file at `path`. Calls run in one thread, one after the other; close it."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Open it. Raises RetrieverError if it is no such file, or missing and `read_only`."""
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="online-store")
        if read_only and not path.is_file():
            fix = "record one first with --online_mode record"
            raise RetrieverError(f"--online_cache {path} is not a file; {fix}")
        try:
            self._database = _open(path, read_only=read_only)
        except (sqlite3.Error, OSError) as error:
            raise RetrieverError(
                f"--online_cache {path} cannot be used as an SQLite file ({error}); name another one"
            ) from error

    async def find(self, key: AnswerKey) -> Found | None:
        """Return what was recorded, or None."""
        return await self._run(lambda: self._find(key))

    async def keep(self, key: AnswerKey, hits: Found) -> Found:
        """Record `hits` unless another process was faster; return what is recorded. `key.date` is a day."""

        def write() -> Found:
            row = (key.source, key.query, key.topk, key.date, datetime.now(UTC).isoformat(), _dump(hits))
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
            kept = self._find(key)
            assert kept is not None
            return kept

        return await self._run(write)

    async def count_request(self, *, limit: int | None) -> bool:
        """Count one request, before it is sent; return False, and count none, at the limit."""

        def write() -> bool:
            bound = -1 if limit is None else limit
            update = "UPDATE requests SET total = total + 1 WHERE ? < 0 OR total < ?"
            return self._database.execute(update, (bound, bound)).rowcount == 1

        return await self._run(write)

    async def num_requests(self) -> int:
        """Return the requests of all engines and processes since the file was made."""
        return await self._run(
            lambda: int(self._database.execute("SELECT total FROM requests").fetchone()[0])
        )

    async def aclose(self) -> None:
        """Close the file once the running calls have ended."""

        def close() -> None:
            self._thread.shutdown(wait=True)
            self._database.close()

        await asyncio.to_thread(close)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _find(self, key: AnswerKey) -> Found | None:
        query = "SELECT hits FROM answers WHERE source = ? AND query = ? AND topk = ?"
        values: tuple[str | int, ...] = (key.source, key.query, key.topk)
        if key.date == ANY_DATE:
            query += " ORDER BY date DESC LIMIT 1"
        else:
            query += " AND date = ?"
            values = (*values, key.date)
        row = self._database.execute(query, values).fetchone()
        return None if row is None else _load(row[0])


def _open(path: Path, *, read_only: bool) -> sqlite3.Connection:
    if not read_only:
        path.parent.mkdir(parents=True, exist_ok=True)
    # In a read-only folder SQLite needs no lock files, and could not make any.
    is_frozen = read_only and not os.access(path.parent, os.W_OK)
    use = "immutable=1" if is_frozen else "mode=ro" if read_only else "mode=rwc"
    uri = f"{path.resolve().as_uri()}?{use}"
    database = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        if not read_only:
            _enter_wal(database)
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("BEGIN IMMEDIATE")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        num_tables = database.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]
        if version == 0 and num_tables == 0 and not read_only:
            for statement in (*_SCHEMA, f"PRAGMA user_version = {_VERSION}"):
                database.execute(statement)
        elif version != _VERSION:
            raise sqlite3.DatabaseError(f"it is not a recording of version {_VERSION}")
        if not read_only:
            database.execute("COMMIT")
    except BaseException:
        database.close()
        raise
    return database


def _enter_wal(database: sqlite3.Connection) -> None:
    """Retry while other processes make the same file at the same moment: SQLite does not wait for them."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _dump(hits: Found) -> str:
    rows = [[hit.document.id, hit.document.contents, hit.score] for hit in hits]
    return json.dumps(rows, ensure_ascii=False)


def _load(text: str) -> Found:
    try:
        rows = json.loads(text)
        return tuple(
            Hit(document=Document(id=name, contents=text), score=score) for name, text, score in rows
        )
    except (ValueError, TypeError) as error:
        raise sqlite3.DatabaseError(f"a recorded answer cannot be read ({error}); record it again") from error

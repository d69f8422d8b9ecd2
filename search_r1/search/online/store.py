"""One SQLite file per project: recorded answers, and what was spent. Several processes may share it.

It has to lie on a local disk: the write-ahead log does not work over network file systems. A recording
in a folder that nobody may write to can still be replayed.
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
from search_r1.search.retriever import Found, Hit
from search_r1.search.schema import Document

T = TypeVar("T")

ANY_DATE = "any"
NANO = 1_000_000_000
"""Money is counted in whole nano-dollars: sums are exact."""

_VERSION = 1
_BUSY_S = 30.0
_SCHEMA = (
    "CREATE TABLE answers (source TEXT NOT NULL, query TEXT NOT NULL, topk INTEGER NOT NULL,"
    " date TEXT NOT NULL, asked_at TEXT NOT NULL, hits TEXT NOT NULL,"
    " PRIMARY KEY (source, query, topk, date)) WITHOUT ROWID",
    "CREATE TABLE spending (engine TEXT NOT NULL, price INTEGER NOT NULL, requests INTEGER NOT NULL,"
    " PRIMARY KEY (engine, price)) WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerKey:
    """What an answer depends on."""

    source: str
    """The engine's name, and its URL where that is not the published one."""
    query: str
    """Normalised."""
    topk: int
    date: str
    """`YYYY-MM-DD`, or `any` to look up the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """All that was ever charged to a file."""

    num_requests: int
    nano_usd: int

    def __str__(self) -> str:
        return f"{self.num_requests} requests, {self.nano_usd / NANO:.4f} USD"


class CapReachedError(Exception):
    """The next request would cost more than the cap leaves."""

    def __init__(self, spent: Spending) -> None:
        super().__init__(str(spent))
        self.spent = spent


def normalise_query(query: str) -> str:
    """One spelling of the same query: NFC, no half characters, single spaces. Letters keep their case."""
    text = query.encode("utf-8", "replace").decode("utf-8")
    return " ".join(unicodedata.normalize("NFC", text).split())


def today() -> str:
    """In UTC."""
    return datetime.now(UTC).date().isoformat()


class OnlineStore:
    """The file at `path`. Calls run in one thread, one after the other; close it."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Raises RetrieverError if there is no such file and `read_only`, or if it is something else."""
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
        """None: not recorded."""
        return await self._run(lambda: self._find(key))

    async def keep(self, key: AnswerKey, hits: Found) -> Found:
        """Record `hits` unless another process was faster; what is recorded now. `key.date` is a day."""

        def write() -> Found:
            row = (key.source, key.query, key.topk, key.date, datetime.now(UTC).isoformat(), _dump(hits))
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
            kept = self._find(key)
            assert kept is not None
            return kept

        return await self._run(write)

    async def charge(self, engine: str, *, price: int, cap: int | None) -> None:
        """Count one request of `price` nano-dollars, before it is sent. Raises CapReachedError instead."""

        def write() -> None:
            # IMMEDIATE: nobody else can spend between the look and the count.
            self._database.execute("BEGIN IMMEDIATE")
            try:
                spent = self._sum()
                if cap is not None and spent.nano_usd + price > cap:
                    raise CapReachedError(spent)
                self._count(engine, price, 1)
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

        await self._run(write)

    async def refund(self, engine: str, *, price: int) -> None:
        """Take back one charge."""
        await self._run(lambda: self._count(engine, price, -1))

    async def spending(self) -> Spending:
        """Of all engines and processes, since the file was made."""
        return await self._run(self._sum)

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

    def _sum(self) -> Spending:
        query = "SELECT COALESCE(SUM(requests), 0), COALESCE(SUM(price * requests), 0) FROM spending"
        num_requests, nano_usd = self._database.execute(query).fetchone()
        return Spending(num_requests=num_requests, nano_usd=nano_usd)

    def _count(self, engine: str, price: int, requests: int) -> None:
        add = "ON CONFLICT DO UPDATE SET requests = requests + excluded.requests"
        self._database.execute(f"INSERT INTO spending VALUES (?, ?, ?) {add}", (engine, price, requests))


def _open(path: Path, *, read_only: bool) -> sqlite3.Connection:
    if not read_only:
        path.parent.mkdir(parents=True, exist_ok=True)
    # Where nobody can write, SQLite needs no lock files, and could not make any.
    is_frozen = read_only and not os.access(path.parent, os.W_OK)
    use = "immutable=1" if is_frozen else "mode=ro" if read_only else "mode=rwc"
    database = sqlite3.connect(
        f"{path.resolve().as_uri()}?{use}",
        uri=True,
        timeout=_BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        _prepare(database, read_only=read_only)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, *, read_only: bool) -> None:
    if not read_only:
        _enter_wal(database)
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("BEGIN IMMEDIATE")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    num_tables = database.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]
    is_new = version == 0 and num_tables == 0 and not read_only
    if not is_new and version != _VERSION:
        raise sqlite3.DatabaseError(f"it is no recording of version {_VERSION}")
    if is_new:
        for statement in _SCHEMA:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {_VERSION}")
    if not read_only:
        database.execute("COMMIT")


def _enter_wal(database: sqlite3.Connection) -> None:
    """SQLite does not wait when several processes make the same file at the same moment; we do."""
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
        raise sqlite3.DatabaseError(f"a recorded answer cannot be read ({error}); record anew") from error

"""One connection of a client, and what it may cost while it is silent."""

from __future__ import annotations

import asyncio
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 30.0
"""How long the head of a request may take to arrive. uvicorn's own timer starts after the first request."""
_MAX_OPEN_FILES = 16384


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files as far as the hard limit allows, to at most 16384."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Connection(H11Protocol):
    """An HTTP connection that a silent client cannot hold.

    It is closed when a request head does not arrive in time. While connections take three quarters of the
    files that the process may open, those that have been silent the longest make room for new ones.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._heard_at = self.loop.time()
        self._head_timer: asyncio.TimerHandle | None = None
        self._watch_head()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _watch_head(self) -> None:
        """Keep one deadline from the first byte of a head to its last, however slowly it arrives."""
        if self.conn.their_state is h11.IDLE:
            self._head_timer = self._head_timer or self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _make_room(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = (_MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(soft, _MAX_OPEN_FILES)) * 3 // 4
        if len(self.connections) <= limit:
            return
        silent = [
            other
            for other in self.connections
            if isinstance(other, Connection)
            and other is not self
            and other.conn.their_state in (h11.IDLE, h11.SEND_BODY)  # no whole request is being worked on
            and not other.transport.is_closing()
        ]
        silent.sort(key=lambda other: other._heard_at)
        for other in silent[: limit // 8 + 1]:  # several at a time, so that sorting costs little
            other.transport.close()

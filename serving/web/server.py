"""Run an application as a process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import socket
from types import FrameType
from typing import Any, NoReturn

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.web.host import Host

HEAD_TIMEOUT_S = 30.0
"""How long the head of a request may take to arrive. uvicorn's own timer starts after the first request."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_BYTES_S = 10
"""How long the sending of finished answers may take."""
_MAX_OPEN_FILES = 16384


def url_of(host: str, port: int) -> str:
    """Return the URL of a service that listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(host: str, port: int, *, env: str | None = None) -> socket.socket:
    """Take the port before anything slow happens. Raises OSError, which names --port and `env`."""
    where = f"{host}:{port}"
    ways = "--port" if env is None else f"--port or {env}"
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With its protocol: asyncio sends small answers at once only on sockets that are known to be TCP.
        listener = socket.socket(*address[:3])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
        listener.listen(2048)
    except PermissionError:
        raise OSError(f"{where}: ports below 1024 are not allowed here; choose another with --port") from None
    except UnicodeError:
        raise OSError(f"cannot listen on {where}: {host!r} is no host name; correct --host") from None
    except OSError as error:
        raise OSError(
            f"cannot listen on {where} ({error.strerror or error}); stop what uses it, or choose another "
            f"with {ways}"
        ) from None
    return listener


async def serve_on(listener: socket.socket, app: ASGIApp) -> None:
    """Serve an application of another library until SIGINT or SIGTERM."""
    await uvicorn.Server(uvicorn.Config(app, log_config=None)).serve(sockets=[listener])


class GracefulServer(uvicorn.Server):
    """Stops in steps: the first signal finishes accepted requests, the second cancels them, the third kills.

    While it finishes it still listens, and answers 503 to new requests.
    """

    def __init__(self, app: FastAPI, *, host: Host[Any], grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Connection,  # h11: httptools reads headers of any length
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=60,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self._host = host
        self._grace_s = grace_s
        self._draining: asyncio.Task[None] | None = None

    def run_on(self, listener: socket.socket) -> None:
        """Serve until a signal or `stop_at_once`."""
        _raise_open_files_limit()
        for number in _STOP_SIGNALS:  # also before and after uvicorn's own handlers are in place
            signal.signal(number, self.handle_exit)
        self.run(sockets=[listener])

    def stop_at_once(self) -> None:
        """Stop without finishing anything."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin or continue the shutdown; unlike uvicorn's handler, do not raise the signal again."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.should_exit = True
        else:
            loop.call_soon_threadsafe(self._continue_shutdown)

    def _continue_shutdown(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
            return
        self._host.abandon()
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    async def _drain(self) -> None:
        await self._host.drain(grace_s=self._grace_s)
        self.should_exit = True


class _Connection(H11Protocol):
    """Closes a connection on which no request head arrives in time, so that silent clients cannot hold it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._watch_head()

    def data_received(self, data: bytes) -> None:
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


def exit_now(status: int) -> NoReturn:
    """End the process now, with its children, without waiting for threads that still load."""
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    os._exit(status)


def _raise_open_files_limit() -> None:
    """Raise the soft limit of open files as far as the hard limit allows, to at most 16384."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

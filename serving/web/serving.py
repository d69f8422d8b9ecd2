"""A service as a process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
from types import FrameType
from typing import NoReturn, Protocol

import uvicorn
from fastapi import FastAPI

from serving.web.connections import Connection, raise_open_files_limit

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_BYTES_S = 10
"""How long finished answers may take to go out."""
_LOOPBACK = ("127.", "localhost", "::1")


class Draining(Protocol):
    """What has requests to finish before the process ends."""

    async def drain(self, *, grace_s: float) -> None:
        """Accept no more and wait for what was accepted; after `grace_s` it is cancelled."""
        ...

    def abandon(self) -> None:
        """Cancel it now."""
        ...


def url_of(host: str, port: int) -> str:
    """Where a service that listens there is reached."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host.startswith(_LOOPBACK)


def listen(host: str, port: int, *, env: str) -> socket.socket:
    """Take the port before anything slow. Raises OSError with a message for the user, which names `env`."""
    where = f"{host}:{port}"
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With its protocol: asyncio sends small answers at once only where a socket says that it is TCP.
        listener = socket.socket(*address[:3])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
        listener.listen(2048)
    except PermissionError:
        raise OSError(f"{where}: ports below 1024 are not allowed here; choose another with --port") from None
    except OSError as error:
        raise OSError(
            f"cannot listen on {where} ({error.strerror or error}); stop what uses it, or choose another "
            f"with --port or {env}"
        ) from None
    return listener


class GracefulServer(uvicorn.Server):
    """Stops in steps: a signal finishes what was accepted, a second one cancels it, a third one kills.

    While it finishes it still listens, and says 503 to everything new.
    """

    def __init__(self, app: FastAPI, *, host: Draining, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,  # h11: httptools reads headers of any length
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
        """Serve until it is stopped."""
        raise_open_files_limit()
        for number in _STOP_SIGNALS:  # also for the moments before and after uvicorn's own handlers
            signal.signal(number, self.handle_exit)
        self.run(sockets=[listener])

    def stop_at_once(self) -> None:
        """There is nothing to finish."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A signal arrived. Being asked to stop is no failure: uvicorn must not raise it again."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.should_exit = True
        else:
            loop.call_soon_threadsafe(self._take_step)

    def _take_step(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
            return
        self._host.abandon()
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    async def _drain(self) -> None:
        await self._host.drain(grace_s=self._grace_s)
        self.should_exit = True


def leave(status: int) -> NoReturn:
    """End now, with what an abandoned load may have started; without waiting for its thread."""
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    os._exit(status)

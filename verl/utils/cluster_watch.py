"""Notice that the head of a Ray cluster has ended, or that a node has left, without calls that block.

Where the head has ended, each call of Ray that asks it blocks until Ray ends this process. Whether it runs is
therefore found by a plain connection, and what only the head knows is asked on a thread beside it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_CONNECT_TIMEOUT_S = 5.0
_ATTEMPTS = 3
"""Connections in a row that may fail for another reason than that nothing listens there."""


class ClusterWatch:
    """Threads that look after a cluster until `close`."""

    def __init__(self, address: str, *, find_gone: Callable[[], str | None]) -> None:
        """Take `address`, HOST:PORT of the head, which `find_gone` asks which part of the run has ended."""
        self.address = address
        self._find_gone = find_gone
        self._dead: str | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="cluster-watch", daemon=True).start()

    def find_dead(self) -> str | None:
        """Return the name of what has ended, if anything; never blocks."""
        return self._dead

    def has_head(self) -> bool:
        """Return whether the head accepts a connection now, so that Ray may ask it."""
        try:
            check_connection(self.address)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the watch."""
        self._closed.set()

    def _run(self) -> None:
        asking: threading.Thread | None = None
        failures = 0
        while failures < _ATTEMPTS and not self._closed.wait(_POLL_S):
            try:
                check_connection(self.address)
            except ConnectionRefusedError:
                failures = _ATTEMPTS  # its process has ended
            except OSError:
                failures += 1
            else:
                failures = 0
                if asking is None or not asking.is_alive():  # it blocks where the head ends meanwhile
                    asking = threading.Thread(target=self._ask, name="cluster-nodes", daemon=True)
                    asking.start()
        if not self._closed.is_set():
            self._dead = f"head at {self.address}"

    def _ask(self) -> None:
        try:
            gone = self._find_gone()
        except Exception as error:  # Ray's errors share no class
            logger.debug("the head at %s gave no answer: %s", self.address, error)
            return
        if self._dead is None:
            self._dead = gone


def check_connection(address: str) -> None:
    """Raise OSError unless something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S):
        return

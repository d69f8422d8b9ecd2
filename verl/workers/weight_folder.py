"""The folder in memory through which a policy hands its weights to the engines of the same node."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import IO

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "verl-weights-"
_LOCK_FILE = "lock"
_MIN_STALE_AGE_S = 60.0
_MARGIN_BYTES = 2**24
"""Room for the header of the file and for other writers."""


class WeightFolder:
    """A new folder in shared memory, or on the disk if that has no room; `remove` it after use.

    It is locked as long as this process lives: what a killed one leaves, the next run on the node removes.
    """

    def __init__(self, num_bytes: int, *, shared: Path = _SHARED_MEMORY) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=find_memory(num_bytes, shared=shared)))
        self._lock = _lock_folder(self.path)

    def remove(self) -> None:
        """Free the memory. Calling it again does nothing."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def is_in_memory(folder: str) -> bool:
    """Return whether the folder of a `WeightFolder` is in shared memory."""
    return Path(folder).is_relative_to(_SHARED_MEMORY)


def find_memory(num_bytes: int, *, shared: Path = _SHARED_MEMORY) -> Path:
    """Return shared memory if it has room (containers often have 64 MiB of it), else the temporary folder.

    What killed runs left there is removed.
    """
    if shared.is_dir() and os.access(shared, os.W_OK):
        _remove_stale_folders(shared)
        if shutil.disk_usage(shared).free >= num_bytes + _MARGIN_BYTES:
            return shared
    disk = Path(tempfile.gettempdir())
    _remove_stale_folders(disk)
    return disk


def _lock_folder(folder: Path) -> IO[bytes]:
    lock = (folder / _LOCK_FILE).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _remove_stale_folders(memory: Path) -> None:
    """Remove the folders of killed runs, which hold no lock any more, also of those in other containers.

    Other users can write to `memory`: only folders of this user are opened, and only if they are folders.
    """
    for folder in memory.glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if not is_ours or time.time() - status.st_mtime < _MIN_STALE_AGE_S:
                continue  # its owner may not have locked it yet
            lock = os.open(folder / _LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(lock, "rb"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # locked by a running process, or removed meanwhile

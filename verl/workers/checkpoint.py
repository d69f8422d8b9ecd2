"""Checkpoint folders that are written atomically, and the newest one that is undamaged.

root/global_step_20/policy         the state of the policy's ranks
root/global_step_20/huggingface    the policy as a model
root/global_step_20/adapter        the adapters alone, with LoRA
root/global_step_20/...            what else the writer wrote
root/global_step_20/manifest.json  size and SHA-256 of every file, written last
root/latest                        name of the folder that was written last
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from serving.files import FileRecord, sha256_of_file, write_atomically, write_json_atomically
from verl.errors import ConfigError

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_POINTER = "latest"
_PREFIX = "global_step_"
CHECKPOINTS = "checkpoints"
"""The root in the folder of a run."""
POLICY = "policy"
EXPORT = "huggingface"
ADAPTER = "adapter"
_HASHING_THREADS = 8

Writer = Callable[[Path], Awaitable[Mapping[Path, FileRecord]]]
"""Fills a folder; returns what it knows of the files in it."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, and how long it took."""

    num_bytes: int
    seconds: float


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: Path, *, keep: int, on_write: Callable[[int], None] | None = None) -> None:
        """Keep the newest `keep` checkpoints; `on_write` is called with the step of each one written."""
        self._root = root
        self._keep = keep
        self._on_write = on_write
        self._good: set[Path] = set()
        self._written: Written | None = None
        self.damages: dict[Path, str] = {}
        """What is wrong with each damaged checkpoint that `latest` found, by folder."""
        for left in root.glob(f".{_PREFIX}*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    async def write(self, step: int, writer: Writer) -> int:
        """Let `writer` fill a folder, make it the checkpoint of this step and remove the oldest ones.

        Returns the step. A failure or a crash leaves all earlier checkpoints unchanged. Hashing and removing
        run on threads.
        """
        start = time.perf_counter()
        folder = self.folder_of(step)
        partial = self._root / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            records = await writer(partial)
            num_bytes = await asyncio.to_thread(_seal, partial, known=records)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        await asyncio.to_thread(self._replace, folder, partial)
        self._written = Written(num_bytes, time.perf_counter() - start)
        if self._on_write is not None:
            self._on_write(step)
        await asyncio.to_thread(self._prune, step)
        return step

    def take_written(self) -> Written | None:
        """Return what the newest checkpoint took, once; None if there is none since the last call."""
        written, self._written = self._written, None
        return written

    def folder_of(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self._root / f"{_PREFIX}{step}"

    def _replace(self, folder: Path, partial: Path) -> None:
        if folder.exists():  # damaged, or of a run that continued from an earlier step
            shutil.rmtree(folder)
        # Before others can see it: it has just been hashed, and `latest` must not do it again.
        self._good.add(folder)
        self.damages.pop(folder, None)
        partial.rename(folder)
        _fsync(self._root)
        write_atomically(self._root / _POINTER, folder.name + "\n")

    def latest(self) -> Path | None:
        """Return the checkpoint written last, or the newest other one that is undamaged, or None."""
        for folder in _candidates(self._root):
            if folder in self._good:
                return folder
            if folder in self.damages:  # found by an earlier call; hashing it again takes minutes
                continue
            damage = find_damage(folder)
            if damage is None:
                self._good.add(folder)
                return folder
            self.damages[folder] = damage
            logger.warning("checkpoint %s is damaged: %s", folder, damage)
        return None

    def _prune(self, step: int) -> None:
        """Remove old checkpoints up to the step just written; later ones belong to another run and stay."""
        earlier = [folder for folder in _candidates(self._root) if (_step_of(folder) or 0) <= step]
        for folder in earlier[self._keep :]:
            shutil.rmtree(folder, ignore_errors=True)
            self._good.discard(folder)


def find_policy(path: str) -> str:
    """Return the model of a run folder (its newest undamaged checkpoint) or of a checkpoint; else `path`.

    Only reads: the run may be going on. Raises ConfigError for a damaged checkpoint, or a run without any.
    """
    folder = Path(path)
    if (folder / EXPORT).is_dir():
        checkpoints = [folder]
    elif (folder / CHECKPOINTS).is_dir():
        checkpoints = _candidates(folder / CHECKPOINTS)
    else:
        return path
    damages = []
    for checkpoint in checkpoints:
        if (damage := find_damage(checkpoint, part=EXPORT)) is None:
            return str(checkpoint / EXPORT)
        damages.append(f"{checkpoint}: {damage}")
        logger.warning("checkpoint %s", damages[-1])
    found = "; ".join(damages) or f"{folder / CHECKPOINTS} holds no checkpoint"
    raise ConfigError(
        f"actor_rollout_ref.model.path={path}: {found}; name the folder of another run, checkpoint or model"
    )


def _candidates(root: Path) -> list[Path]:
    """Return the checkpoints, the one written last first, then by step from the newest."""
    folders = [f for f in root.glob(f"{_PREFIX}*") if f.is_dir() and _step_of(f) is not None]
    folders.sort(key=lambda folder: _step_of(folder) or 0, reverse=True)
    pointer = root / _POINTER
    last = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return sorted(folders, key=lambda folder: folder.name != last)


def find_damage(folder: Path, *, part: str = "") -> str | None:
    """Return what is wrong with a checkpoint, or None: every file of its manifest must exist unchanged.

    `part` is a folder in it that is checked alone.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        records = {folder / name: record for name, record in manifest["files"].items()}
        chosen = [path for path in records if path.is_relative_to(folder / part)]
        for path in chosen:
            if not path.is_file():
                return f"{path.relative_to(folder)} is missing"
            size, expected = path.stat().st_size, records[path]["size"]
            if size != expected:
                return f"{path.relative_to(folder)} has {size} bytes, not {expected}"
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            for path, digest in zip(chosen, pool.map(sha256_of_file, chosen), strict=True):
                if digest != records[path]["sha256"]:
                    return f"{path.relative_to(folder)} has changed"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except OSError as error:
        return f"{error.filename or _MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    return None


def _seal(folder: Path, *, known: Mapping[Path, FileRecord]) -> int:
    """Write the manifest and flush every file and folder to the disk; return the bytes of all files.

    Files that are not known are hashed.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    records = {}
    for path in files:
        _fsync(path)
        records[str(path.relative_to(folder))] = known.get(path) or FileRecord(
            size=path.stat().st_size, sha256=sha256_of_file(path)
        )
    write_json_atomically(folder / _MANIFEST, {"files": records})
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _fsync(path)
    return sum(record["size"] for record in records.values())


def _step_of(folder: Path) -> int | None:
    digits = folder.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdecimal() else None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

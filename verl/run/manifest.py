"""`run_manifest.json`: what was run, so that two runs can be compared and one can be repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from serving.files import sha256_of_file, write_json_atomically
from serving.redaction import redact, redact_text
from verl.errors import DataError
from verl.trainer.config.schema import Config
from verl.utils.files import parse_json

MANIFEST_FILE = "run_manifest.json"
MAX_HASHED_BYTES = 512 * 2**20
"""Files of a model folder are hashed up to this size, data files whole."""

Manifest = dict[str, Any]


class _Git(TypedDict):
    sha: str
    dirty: bool


class _Machine(TypedDict, total=False):
    gpus: list[str]


@with_config(ConfigDict(extra="allow"))
class _Shape(TypedDict, total=False):
    """The entries that readers of a manifest use."""

    status: str
    reason: str | None
    started: str
    finished: str | None
    saved_step: int | None
    resumed_from: int | None
    config: dict[str, Any]
    seeds: dict[str, int]
    data: list[dict[str, Any]]
    services: dict[str, Any]
    git: _Git | None
    machine: _Machine
    packages: dict[str, str]
    earlier_starts: list[dict[str, Any]]


_SHAPE = TypeAdapter(_Shape)


def make_manifest(
    config: Config,
    *,
    services: Mapping[str, object],
    model_folder: Path | None = None,
    prompt_file: Path | None = None,
    prompt: str | None = None,
    trains: bool = True,
) -> Manifest:
    """Describe a run that starts. Raises DataError for a missing data file.

    `services` is what the services report about themselves, `model_folder` the folder of a hub model,
    `prompt_file` the file of the instruction and other fixed texts, `prompt` a rendered prompt. A run that
    does not train reads no training files.
    """
    model_path = config.actor_rollout_ref.model.path
    files = [*(config.data.train_paths if trains else ()), *config.data.val_paths]
    text = None if prompt is None else {"sha256": hashlib.sha256(prompt.encode()).hexdigest(), "text": prompt}
    return {
        "status": "running",
        "reason": None,
        "started": _now(),
        "finished": None,
        "config": dataclasses.asdict(config),
        "seeds": {"trainer.seed": config.trainer.seed},
        "model": {"path": model_path, "files": _describe_folder(model_folder or Path(model_path))},
        "data": [{"path": file, **describe_file(Path(file))} for file in files],
        "services": services,
        "prompt_file": None
        if prompt_file is None
        else {"path": str(prompt_file), **describe_file(prompt_file)},
        "prompt": text,
        "git": _describe_git(Path(__file__).resolve().parents[2]),
        "machine": _describe_machine(),
        "packages": dict(sorted((d.name, d.version) for d in metadata.distributions())),
    }


def write_manifest(run_dir: Path, manifest: Manifest, *, resumed_from: int | None = None) -> None:
    """Write the manifest at the start of a run, secrets redacted.

    Of an earlier manifest `saved_step` is kept, and how that start ended is added to `earlier_starts`.
    """
    earlier = read_manifest(run_dir)
    update = {
        "resumed_from": resumed_from,
        "saved_step": (earlier or {}).get("saved_step"),
        "earlier_starts": [] if earlier is None else [*earlier.get("earlier_starts", []), _summary(earlier)],
    }
    write_json_atomically(run_dir / MANIFEST_FILE, redact(manifest | update))


def update_manifest(run_dir: Path, **changes: object) -> None:
    """Replace entries of the manifest."""
    write_json_atomically(run_dir / MANIFEST_FILE, redact((read_manifest(run_dir) or {}) | changes))


def finish_manifest(run_dir: Path, *, status: str, reason: str | None = None, step: int) -> None:
    """Record how the run ended: completed, failed or interrupted, after `step` finished steps."""
    update_manifest(run_dir, status=status, reason=reason, finished=_now(), results={"step": step})


def read_manifest(run_dir: Path) -> Manifest | None:
    """Return the manifest, or None if there is none. Raises DataError if it is damaged."""
    path = run_dir / MANIFEST_FILE
    if not path.is_file():
        return None
    text = path.read_bytes()
    parse_json(text, shape=_SHAPE, where=str(path), fix="restore it, or remove it to go on without it")
    manifest: Manifest = json.loads(text)
    return manifest


def describe_file(path: Path, *, max_hashed_bytes: int | None = None) -> Manifest:
    """Return size and SHA-256 of a file, if it is larger than `max_hashed_bytes` that of its beginning."""
    if not path.is_file():
        raise DataError(f"data file {path} is not there")
    size = path.stat().st_size
    if max_hashed_bytes is None or size <= max_hashed_bytes:
        return {"bytes": size, "sha256": sha256_of_file(path)}
    beginning = sha256_of_file(path, max_bytes=max_hashed_bytes)
    return {"bytes": size, "sha256": None, "sha256_of_beginning": beginning}


def _describe_folder(folder: Path) -> Manifest | None:
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: describe_file(path, max_hashed_bytes=MAX_HASHED_BYTES) for path in files}


def _describe_git(root: Path) -> Manifest | None:
    """Return the commit and whether the tree differs from it; None without a checkout or without git."""
    sha = _output("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else None
    if sha is None:
        return None
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"sha": sha, "dirty": changes != ""}


def _describe_machine() -> Manifest:
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": _describe_processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": gpus.splitlines() if gpus else [],
    }


def _describe_processor() -> str:
    """Return the model of the processor, as Linux says it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


def _summary(manifest: Manifest) -> Manifest:
    kept = ("started", "finished", "status", "reason", "resumed_from", "git")
    summary = {name: manifest.get(name) for name in kept}
    # This process holds the folder's lock, so a run that still counts as running was killed.
    return summary | ({"status": "killed"} if summary["status"] == "running" else {})


def _output(command: str, *arguments: str) -> str | None:
    """Return what a program prints; None if it is missing or fails."""
    try:
        done = subprocess.run(
            [command, *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return redact_text(done.stdout.strip())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

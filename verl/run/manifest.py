"""`run_manifest.json`: what exactly was run, so that two runs can be compared and one can be repeated."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from serving.files import sha256_of_file, write_atomically
from serving.redaction import redact, redact_text
from verl.errors import DataError
from verl.utils.files import parse_json

MANIFEST_FILE = "run_manifest.json"
MAX_HASHED_BYTES = 512 * 2**20
"""Of a larger file of a model folder only this much is hashed; data files are hashed whole."""

Manifest = dict[str, Any]


class _Git(TypedDict):
    sha: str
    dirty: bool


class _Machine(TypedDict, total=False):
    gpus: list[str]


@with_config(ConfigDict(extra="allow"))
class _Shape(TypedDict, total=False):
    """What readers of a manifest rely on."""

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
    *,
    config: Mapping[str, object],
    data_files: Sequence[str | Path],
    model_path: str,
    model_folder: Path | None = None,
    seeds: Mapping[str, int],
    services: Mapping[str, object],
    prompt_file: Path | None = None,
    prompt: str | None = None,
) -> Manifest:
    """Describe a run that starts. Raises DataError for a missing data file.

    `model_folder` holds the files of `model_path`, `services` what the health endpoints answered, `prompt` a
    rendered prompt, `prompt_file` the file of the instruction and the other fixed texts.
    """
    return {
        "status": "running",
        "reason": None,
        "started": _now(),
        "finished": None,
        "config": config,
        "seeds": dict(seeds),
        "model": describe_model(model_path, model_folder or Path(model_path)),
        "data": [describe_file(Path(file)) for file in data_files],
        "services": services,
        "prompt_file": None if prompt_file is None else describe_file(prompt_file),
        "prompt": None
        if prompt is None
        else {"sha256": hashlib.sha256(prompt.encode()).hexdigest(), "text": prompt},
        "git": describe_git(Path(__file__).resolve().parents[2]),
        "machine": describe_machine(),
        "packages": dict(sorted((d.name, d.version) for d in metadata.distributions())),
    }


def write_manifest(run_dir: Path, manifest: Manifest, *, resumed_from: int | None = None) -> Path:
    """Write the manifest at the start of a run, secrets redacted; returns its path.

    Of one that is already there, `earlier_starts` keeps how it ended, and `saved_step` stays.
    """
    earlier = read_manifest(run_dir)
    starts = {
        "resumed_from": resumed_from,
        "saved_step": (earlier or {}).get("saved_step"),
        "earlier_starts": [] if earlier is None else [*earlier.get("earlier_starts", []), _summary(earlier)],
    }
    path = run_dir / MANIFEST_FILE
    write_atomically(path, _as_json(redact(manifest | starts)))
    return path


def update_manifest(run_dir: Path, **changes: object) -> None:
    """Replace entries of the manifest."""
    manifest = (read_manifest(run_dir) or {}) | changes
    write_atomically(run_dir / MANIFEST_FILE, _as_json(redact(manifest)))


def finish_manifest(run_dir: Path, *, status: str, reason: str | None = None, **facts: object) -> None:
    """Record how the run ended: `status` is completed, failed or interrupted, `facts` are results to keep."""
    update_manifest(run_dir, status=status, reason=reason, finished=_now(), results=facts)


def read_manifest(run_dir: Path) -> Manifest | None:
    """Return the manifest, or None if the run has none. Raises DataError if it is damaged."""
    path = run_dir / MANIFEST_FILE
    if not path.is_file():
        return None
    text = path.read_bytes()
    parse_json(text, shape=_SHAPE, where=str(path), fix="restore it, or remove it to go on without it")
    manifest: Manifest = json.loads(text)
    return manifest


def describe_file(path: Path, *, max_hashed_bytes: int | None = None) -> Manifest:
    """Path, size and SHA-256; of a file larger than `max_hashed_bytes` that of its beginning alone."""
    if not path.is_file():
        raise DataError(f"data file {path} is not there")
    size = path.stat().st_size
    if max_hashed_bytes is None or size <= max_hashed_bytes:
        return {"path": str(path), "bytes": size, "sha256": sha256_of_file(path)}
    beginning = sha256_of_file(path, max_bytes=max_hashed_bytes)
    return {"path": str(path), "bytes": size, "sha256": None, "sha256_of_beginning": beginning}


def describe_model(model_path: str, folder: Path) -> Manifest:
    """Path or hub id, and every file of the folder if there is one."""
    if not folder.is_dir():
        return {"path": model_path, "files": None}
    files = {
        p.name: describe_file(p, max_hashed_bytes=MAX_HASHED_BYTES)
        for p in sorted(folder.iterdir())
        if p.is_file()
    }
    return {
        "path": model_path,
        "files": {name: {k: v for k, v in facts.items() if k != "path"} for name, facts in files.items()},
    }


def describe_git(root: Path) -> Manifest | None:
    """Commit and whether the tree differs from it; None outside a git checkout or without git."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    sha = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if sha is None:
        return None
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"sha": sha, "dirty": changes != ""}


def describe_machine() -> Manifest:
    gpus = None
    if shutil.which("nvidia-smi") is not None:
        gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": gpus.splitlines() if gpus else [],
    }


def _summary(manifest: Manifest) -> Manifest:
    kept = ("started", "finished", "status", "reason", "resumed_from", "git")
    summary = {name: manifest.get(name) for name in kept}
    # The folder is ours now, so a run that still counts as running was killed.
    return summary | ({"status": "killed"} if summary["status"] == "running" else {})


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return redact_text(done.stdout.strip())


def _as_json(manifest: Manifest) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n"


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")

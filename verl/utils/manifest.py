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

from serving.redaction import redact, redact_text
from verl.errors import DataError
from verl.utils.files import write_atomically

MANIFEST_FILE = "run_manifest.json"
RUN_PARTS = (
    MANIFEST_FILE,
    "metrics.jsonl",
    "trajectories",
    "evaluation",
    "skipped",
    "checkpoints",
    "report.html",
    "wandb",
    "wandb_id",
)
"""What a run leaves in its folder, the log apart, which is open."""
MAX_HASHED_BYTES = 512 * 2**20
"""Larger files of a model folder are listed by size only; data files are hashed whatever their size."""

Manifest = dict[str, Any]


def write_manifest(
    run_dir: Path,
    *,
    config: Mapping[str, object],
    data_files: Sequence[str | Path],
    model_path: str,
    seeds: Mapping[str, int],
    services: Mapping[str, object],
    prompt: str | None = None,
    resumed_from: int | None = None,
) -> Path:
    """Write the manifest at the start of a run, secrets redacted; returns its path.

    `services` holds what the health endpoints answered, `prompt` a rendered prompt. A manifest
    that is already there (a resumed run) goes to `earlier_starts`. Raises DataError for a missing data file.
    """
    path = run_dir / MANIFEST_FILE
    manifest: Manifest = {
        "status": "running",
        "reason": None,
        "started": _now(),
        "finished": None,
        "resumed_from": resumed_from,
        "config": config,
        "seeds": dict(seeds),
        "model": describe_model(model_path),
        "data": [describe_file(Path(file)) for file in data_files],
        "services": services,
        "prompt": None
        if prompt is None
        else {"sha256": hashlib.sha256(prompt.encode()).hexdigest(), "text": prompt},
        "git": describe_git(Path(__file__).resolve().parents[2]),
        "machine": describe_machine(),
        "packages": dict(sorted((d.name, d.version) for d in metadata.distributions())),
        "earlier_starts": _earlier_starts(run_dir),
    }
    write_atomically(path, _as_json(redact(manifest)))
    return path


def finish_manifest(run_dir: Path, *, status: str, reason: str | None = None, **facts: object) -> None:
    """Say how the run ended: `status` is completed, failed or interrupted, `facts` are results to keep."""
    manifest = read_manifest(run_dir) or {}
    manifest |= {"status": status, "reason": reason, "finished": _now(), "results": facts}
    write_atomically(run_dir / MANIFEST_FILE, _as_json(redact(manifest)))


def read_manifest(run_dir: Path) -> Manifest | None:
    """The manifest, or None if the run has none. Raises DataError if it is not JSON."""
    path = run_dir / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); remove it to go on without it") from error
    assert isinstance(manifest, dict)
    return manifest


def set_aside_previous_run(run_dir: Path) -> Path | None:
    """Move what an earlier run left here to `previous-<time>/`: a new run mixes nothing, loses nothing."""
    left = [run_dir / name for name in RUN_PARTS if (run_dir / name).exists()]
    if not left:
        return None
    target = run_dir / f"previous-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    target.mkdir()
    for path in left:
        path.rename(target / path.name)
    return target


def describe_file(path: Path, *, max_hashed_bytes: int | None = None) -> Manifest:
    """Path, size and SHA-256 (null above `max_hashed_bytes`)."""
    if not path.is_file():
        raise DataError(f"data file {path} is not there")
    size = path.stat().st_size
    digest = None
    if max_hashed_bytes is None or size <= max_hashed_bytes:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": size, "sha256": digest}


def describe_model(model_path: str) -> Manifest:
    """A local folder file by file; a hub id by its name."""
    folder = Path(model_path)
    if not folder.is_dir():
        return {"path": model_path, "files": None}
    files = {
        p.name: describe_file(p, max_hashed_bytes=MAX_HASHED_BYTES)
        for p in sorted(folder.iterdir())
        if p.is_file()
    }
    return {
        "path": model_path,
        "files": {
            name: {"bytes": facts["bytes"], "sha256": facts["sha256"]} for name, facts in files.items()
        },
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


def _earlier_starts(run_dir: Path) -> list[Manifest]:
    earlier = read_manifest(run_dir)
    if earlier is None:
        return []
    kept = ("started", "finished", "status", "reason", "resumed_from", "git")
    return [*earlier.get("earlier_starts", []), {name: earlier.get(name) for name in kept}]


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

"""What an index was made of, written next to it, so that a wrong combination is refused and not searched."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from search_r1.search.errors import RetrieverError


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexManifest:
    """The facts that corpus, encoder and index must agree on."""

    retriever_name: str
    encoder_sha256: str
    pooling: str
    query_prefix: str
    passage_prefix: str
    max_length: int
    normalised: bool
    metric: str
    dim: int
    index_sha256: str
    """Of the index file, as written."""
    corpus_sha256: str
    count: int
    """Passages in corpus and index."""
    faiss_version: str
    """For the record; any version may read the index."""

    def save(self, index_path: Path) -> None:
        """Write it next to the index, atomically."""
        path = locate_manifest(index_path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)


def hash_index(index_path: Path) -> str:
    """SHA-256 of the file: about a second per 1.5 GB, so 45 s for wiki-18, if the disk keeps up."""
    with index_path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate_manifest(index_path: Path) -> Path:
    """`<index>.manifest.json`"""
    return index_path.with_name(index_path.name + ".manifest.json")


def load_manifest(index_path: Path) -> IndexManifest | None:
    """None when there is no manifest. Raises RetrieverError when there is one that cannot be read."""
    path = locate_manifest(index_path)
    if not path.exists():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RetrieverError(f"index manifest {path} is not JSON ({error}); rebuild the index") from error
    names = {field.name for field in fields(IndexManifest)}
    if not isinstance(entries, dict) or set(entries) != names:
        found = sorted(entries) if isinstance(entries, dict) else type(entries).__name__
        raise RetrieverError(
            f"index manifest {path} has {found}, expected {sorted(names)}; rebuild the index"
        )
    return IndexManifest(**entries)


def compare_manifests(recorded: IndexManifest, *, actual: IndexManifest) -> list[str]:
    """One line for every fact that differs, except the Faiss version."""
    pairs = (
        (field.name, getattr(recorded, field.name), getattr(actual, field.name))
        for field in fields(IndexManifest)
        if field.name != "faiss_version"
    )
    return [f"{name}: index was built with {old!r}, found {new!r}" for name, old, new in pairs if old != new]

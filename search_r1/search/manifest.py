"""What an index was made of, written next to it, so that a wrong combination is refused and not searched."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from search_r1.search.errors import RetrieverError
from search_r1.search.fingerprint import FileFacts, fingerprint
from serving.files import write_json_atomically

VERSION = 2
VECTORS_SUFFIX = ".vectors"
"""Of the file next to an `ivf_pq` or `binary` index with the vectors that rescore its candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexManifest:
    """The facts that corpus, encoder and index must agree on. No paths: the files may move together."""

    version: int
    kind: str
    parameters: dict[str, int | str]
    """What the index was built with, every number set."""
    retriever_name: str | None
    """For the record, like the name of the encoder: what they decide is in the fields below."""
    encoder: str
    encoder_sha256: str
    pooling: str
    query_prefix: str
    passage_prefix: str
    max_length: int
    dim: int
    metric: str
    normalised: bool
    corpus: FileFacts
    count: int
    """Passages in corpus and index."""
    files: dict[str, FileFacts]
    """Every file of the index by its name; all lie in the folder of the manifest."""
    faiss_version: str
    built_with: str
    """Version of this package. For the record, like that of Faiss."""

    def save(self, index_path: Path) -> None:
        """Write it next to the index, atomically."""
        write_json_atomically(locate_manifest(index_path), asdict(self))


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
    if not isinstance(entries, dict):
        kind = type(entries).__name__
        raise RetrieverError(f"index manifest {path} is a JSON {kind}, expected an object; rebuild the index")
    version = entries.get("version", 1)
    if version != VERSION:
        raise RetrieverError(
            f"index manifest {path} has version {version!r}, not {VERSION}; rebuild the index"
        )
    try:
        return _read_entries(entries)
    except (TypeError, ValueError) as error:
        raise RetrieverError(f"index manifest {path} is malformed: {error}; rebuild the index") from error


def list_changed_files(manifest: IndexManifest, index_path: Path) -> list[str]:
    """One line for every file of the index that is missing or not the one that was built, by fingerprint."""
    problems = []
    main = index_path.name
    if main not in manifest.files:
        problems.append(f"files: {sorted(manifest.files)} were built, not {main}; give it its name again")
    side = main + VECTORS_SUFFIX
    if side not in manifest.files and index_path.with_name(side).exists():
        problems.append(f"files.{side}: index was built without such a file, found one; take it away")
    for name, facts in manifest.files.items():
        path = index_path.with_name(name)
        if not path.is_file():
            problems.append(f"files.{name}: missing in {index_path.parent}; copy it there too")
            continue
        size = path.stat().st_size
        if size != facts.bytes:
            problems.append(f"files.{name}.bytes: index was built with {facts.bytes}, found {size}")
        elif (found := fingerprint(path)) != facts.fingerprint:
            problems.append(
                f"files.{name}.fingerprint: index was built with {facts.fingerprint}, found {found}"
            )
    return problems


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "version": int,
    "kind": str,
    "parameters": dict,
    "retriever_name": (str, type(None)),
    "encoder": str,
    "encoder_sha256": str,
    "pooling": str,
    "query_prefix": str,
    "passage_prefix": str,
    "max_length": int,
    "dim": int,
    "metric": str,
    "normalised": bool,
    "corpus": dict,
    "count": int,
    "files": dict,
    "faiss_version": str,
    "built_with": str,
}


def _read_entries(entries: dict[str, Any]) -> IndexManifest:
    """Raises ValueError that names the first entry that is missing, unknown or of a wrong type."""
    names = [field.name for field in fields(IndexManifest)]
    if missing := [name for name in names if name not in entries]:
        raise ValueError(f"{missing[0]!r} is missing")
    if unknown := sorted(set(entries) - set(names)):
        raise ValueError(f"{unknown[0]!r} is unknown")
    for name, expected in _FIELD_TYPES.items():
        if not isinstance(entries[name], expected):
            raise ValueError(f"{name!r} is {entries[name]!r}")
    files = {name: _read_facts(f"files.{name}", facts) for name, facts in entries["files"].items()}
    if outside := [name for name in files if Path(name).name != name]:
        raise ValueError(f"'files' names {outside[0]!r}, expected a bare file name")
    return IndexManifest(**{**entries, "corpus": _read_facts("corpus", entries["corpus"]), "files": files})


def _read_facts(name: str, entries: object) -> FileFacts:
    expected = {field.name for field in fields(FileFacts)}
    if not isinstance(entries, dict) or set(entries) != expected:
        raise ValueError(f"{name!r} is {entries!r}, expected the keys {sorted(expected)}")
    if not isinstance(entries["bytes"], int):
        raise ValueError(f"'{name}.bytes' is {entries['bytes']!r}")
    return FileFacts(**entries)

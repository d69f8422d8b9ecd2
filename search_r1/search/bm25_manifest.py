"""What a BM25 index was made of, written into its folder, so that a wrong corpus is refused and not searched.

    index/bm25/bm25.json     this manifest; it names the folder that counts
    index/bm25/terms-1/      tantivy's files

A new build writes the next folder and then this file, at once: killed at any time, the old index stands.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from search_r1.search.corpus import Corpus
from search_r1.search.errors import RetrieverError
from search_r1.search.fingerprint import FileFacts, describe_file, fingerprint
from serving.files import sha256_of_file, write_json_atomically

LANGUAGES = ("english", "none")
"""Of the stemmer."""
K1 = 1.2
B = 0.75
ANALYSIS = 1
"""Grows when the same text gives other terms."""
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bm25Manifest:
    """The facts that corpus and index must agree on. No paths: the files may move."""

    version: Literal[1]
    kind: Literal["bm25"]
    language: Literal["english", "none"]
    analysis: int
    """How text becomes terms, see `ANALYSIS`."""
    k1: float
    b: float
    corpus: FileFacts
    count: int
    """Passages in corpus and index."""
    folder: Annotated[str, Field(pattern=r"^terms-[0-9]+$")]
    """Of tantivy's files, beside this file."""
    files: dict[Annotated[str, Field(pattern=r"^[^/]+$")], FileFacts]
    """Every file in `folder`."""
    tantivy_version: str
    """That wrote the files."""

    def save(self, index_path: Path) -> None:
        """Write it into the folder `index_path`, atomically."""
        write_json_atomically(locate_bm25_manifest(index_path), asdict(self))


def describe_bm25(folder: Path, *, corpus: Corpus, language: str, tantivy_version: str) -> Bm25Manifest:
    """The manifest of what was just written; reads all of corpus and index."""
    return _READER.validate_python(
        {
            "version": _VERSION,
            "kind": "bm25",
            "language": language,
            "analysis": ANALYSIS,
            "k1": K1,
            "b": B,
            "corpus": FileFacts(bytes=corpus.num_bytes, fingerprint=corpus.fingerprint, sha256=corpus.sha256),
            "count": len(corpus),
            "folder": folder.name,
            "files": {
                path.name: describe_file(path)
                for path in sorted(folder.iterdir())
                if not path.name.endswith(".lock")
            },
            "tantivy_version": tantivy_version,
        }
    )


def locate_bm25_manifest(index_path: Path) -> Path:
    """`<index>/bm25.json`"""
    return index_path / "bm25.json"


def load_bm25_manifest(index_path: Path, *, rebuild: str) -> Bm25Manifest:
    """Raises RetrieverError when there is none, or one that cannot be read. `rebuild`: the command."""
    path = locate_bm25_manifest(index_path)
    if not path.is_file():
        found = "is not a BM25 index (it has no bm25.json)" if index_path.exists() else "does not exist"
        raise RetrieverError(f"BM25 index {index_path} {found}; build it: {rebuild}")
    try:
        return _READER.validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise RetrieverError(
            f"manifest {path} is malformed: {field}: {problem['msg']}; rebuild the index: {rebuild}"
        ) from error


def list_changed_bm25_files(recorded: Bm25Manifest, *, index_path: Path, full_check: bool) -> list[str]:
    """One line for every file that is missing or not the one that was written."""
    problems = []
    for name, facts in recorded.files.items():
        path = index_path / recorded.folder / name
        if not path.is_file():
            problems.append(f"files.{name}: missing in {path.parent}")
        elif (size := path.stat().st_size) != facts.bytes:
            problems.append(f"files.{name}.bytes: written with {facts.bytes}, found {size}")
        elif (found := fingerprint(path)) != facts.fingerprint:
            problems.append(f"files.{name}.fingerprint: written with {facts.fingerprint}, found {found}")
        elif full_check and (found := sha256_of_file(path)) != facts.sha256:
            problems.append(f"files.{name}.sha256: written with {facts.sha256}, found {found}")
    return problems


def list_bm25_misfits(recorded: Bm25Manifest, *, corpus: Corpus, full_check: bool) -> list[str]:
    """One line for every fact on which index, corpus and this program do not agree."""
    pairs: list[tuple[str, object, object]] = [
        ("analysis", recorded.analysis, ANALYSIS),
        ("k1", recorded.k1, K1),
        ("b", recorded.b, B),
        ("count", recorded.count, len(corpus)),
        ("corpus.bytes", recorded.corpus.bytes, corpus.num_bytes),
        ("corpus.fingerprint", recorded.corpus.fingerprint, corpus.fingerprint),
    ]
    if full_check:
        pairs.append(("corpus.sha256", recorded.corpus.sha256, corpus.sha256))
    return [f"{name}: index was built with {old!r}, found {new!r}" for name, old, new in pairs if old != new]


_READER = TypeAdapter(Bm25Manifest)

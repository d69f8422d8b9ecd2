"""What an index was made of, written beside it, so that a wrong combination is refused and not searched.

e5_Flat.index.manifest.json     of a Faiss index
index/bm25/bm25.json            of a BM25 index; it names the folder of tantivy's files that counts
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from search_r1.search.errors import RetrieverError
from search_r1.search.files import FileFacts
from serving.files import write_json_atomically

BM25_LANGUAGES = ("english", "none")
"""Of the stemmer."""

_FileName = Annotated[str, Field(pattern=r"^[^/]+$")]
_Manifest = TypeVar("_Manifest", "IndexManifest", "Bm25Manifest")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexManifest:
    """The facts that corpus, encoder and Faiss index must agree on. No paths: the files may move together."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    version: Literal[2] = 2
    kind: str
    parameters: dict[str, int | str]
    """What the index was built with, such as its Faiss factory string."""
    retriever_name: str | None
    """Family of the encoder. For the record, like its name: what they decide is in the fields below."""
    encoder: str
    encoder_sha256: str
    pooling: str
    query_prefix: str
    passage_prefix: str
    max_length: int
    dim: int
    metric: Literal["inner_product"] = "inner_product"
    normalized: Annotated[bool, Field(alias="normalised")]
    """Published files spell it with an s."""
    corpus: FileFacts
    count: int
    """Passages in corpus and index."""
    files: dict[_FileName, FileFacts]
    """The index file by its name, in the folder of the manifest."""
    faiss_version: str
    built_with: str
    """Version of this package. For the record, like that of Faiss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bm25Manifest:
    """The facts that corpus and BM25 index must agree on."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    version: Literal[1] = 1
    kind: Literal["bm25"] = "bm25"
    language: Literal["english", "none"]
    analysis: int
    """Grows when the same text gives other terms."""
    k1: float
    b: float
    corpus: FileFacts
    count: int
    folder: Annotated[str, Field(pattern=r"^terms-[0-9]+$")]
    """Of tantivy's files, beside this file."""
    files: dict[_FileName, FileFacts]
    """Every file in `folder`."""
    tantivy_version: str


def locate_manifest(index_path: Path) -> Path:
    """Return `<index>.manifest.json`."""
    return index_path.with_name(index_path.name + ".manifest.json")


def locate_bm25_manifest(index_path: Path) -> Path:
    """Return `<index>/bm25.json`."""
    return index_path / "bm25.json"


def save_manifest(manifest: IndexManifest | Bm25Manifest, path: Path) -> None:
    """Write a manifest, complete or not at all."""
    write_json_atomically(path, TypeAdapter(type(manifest)).dump_python(manifest, mode="json", by_alias=True))


def load_manifest(index_path: Path) -> IndexManifest | None:
    """Return the manifest of a Faiss index, None when there is none. Raises RetrieverError if broken."""
    path = locate_manifest(index_path)
    return _read(path, IndexManifest, fix="rebuild the index") if path.exists() else None


def load_bm25_manifest(index_path: Path, *, rebuild: str) -> Bm25Manifest:
    """Return the manifest of a BM25 index; `rebuild` is the command. Raises RetrieverError."""
    path = locate_bm25_manifest(index_path)
    if not path.is_file():
        found = "is not a BM25 index (it has no bm25.json)" if index_path.exists() else "does not exist"
        raise RetrieverError(f"BM25 index {index_path} {found}; build it: {rebuild}")
    return _read(path, Bm25Manifest, fix=f"rebuild the index: {rebuild}")


def _read(path: Path, kind: type[_Manifest], *, fix: str) -> _Manifest:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise RetrieverError(f"manifest {path} is malformed: {field}: {problem['msg']}; {fix}") from error

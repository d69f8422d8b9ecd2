"""Passages by row number, read from a file: JSON lines, or Arrow (uncompressed, memory-mapped).

No text is held in memory, and of a large JSONL file not even the line offsets: those are in a memory-mapped
sidecar (line_offsets.py). Lines are parsed when they are asked for. A file that was changed after its
opening is noticed at every access (files.WatchedFile).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from search_r1.search.errors import RetrieverError
from search_r1.search.files import FileFacts, WatchedFile, compare_facts, fingerprint
from search_r1.search.line_offsets import find_line_starts, is_checked, mark_checked
from search_r1.search.schema import Document
from serving.files import sha256_of_file

if TYPE_CHECKING:
    import pyarrow as pa

_LINES_PER_REPORT = 250_000
_EXPECTED = 'expected one JSON object like {"id": "0", "contents": "\\"Title\\"\\ntext"}'
_MAX_SHOWN_CHARS = 60
# Compressed columns are unpacked into memory as they are opened; mapped ones take next to nothing.
_UNPACKED_BYTES = 1 << 20

Report = Callable[[int, int], None]


class _Rows(Protocol):
    """The passages of one file format. Rows are in range."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Document:
        """Return a passage. Raises RetrieverError that names file and line when it is malformed."""
        ...

    @property
    def sidecar(self) -> Path | None:
        """Return the file of line offsets, if there is one."""
        ...

    def close(self) -> None: ...


class Corpus:
    """Passages by row. Use `open_corpus`."""

    def __init__(self, path: Path, *, file: WatchedFile, rows: _Rows) -> None:
        self.path = path
        self.num_bytes = path.stat().st_size
        self._file = file
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Document:
        """Return a passage.

        Raises IndexError, RetrieverError when it is malformed, ChangedFileError when the file was changed.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        self._file.check()
        passage = self._rows.read(row)
        self._file.check()
        return passage

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of the file, see files.py; cheap."""
        return fingerprint(self.path)

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, which is read at the first access."""
        return sha256_of_file(self.path)

    @property
    def facts(self) -> FileFacts:
        """Return what identifies the file; all of it is read."""
        return FileFacts(bytes=self.num_bytes, fingerprint=self.fingerprint, sha256=self.sha256)

    def check(self, report: Report | None = None) -> None:
        """Parse every passage, about 5 microseconds each. Raises RetrieverError at the first malformed one.

        A large JSONL file is remembered as checked, in its sidecar.
        """
        if is_checked(self._rows.sidecar):
            return
        for count, _ in enumerate(self, start=1):
            if report is not None and (count % _LINES_PER_REPORT == 0 or count == len(self)):
                report(count, len(self))
        mark_checked(self._rows.sidecar)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._rows.close()


def open_corpus(path: Path, *, report: Report | None = None) -> Corpus:
    """Open a corpus; its first bytes identify the format. Raises RetrieverError for any other file.

    `report(done, total)`, in bytes, while a large JSONL file is opened for the first time.
    """
    if not path.is_file():
        raise RetrieverError(f"corpus {path} is not a file; pass --corpus_path of a JSONL or Arrow file")
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        raise RetrieverError(f"corpus {path} is empty; expected one JSON object per line")
    if start.startswith(b"\x1f\x8b"):
        raise RetrieverError(f"corpus {path} is compressed; unpack it first: gunzip -k {path}")
    if start.startswith(b"PAR1"):
        raise RetrieverError(
            f"corpus {path} is a Parquet file, which has no cheap access to single rows; convert it: "
            'python -c "import pyarrow.parquet as p, pyarrow.feather as f; '
            f"f.write_feather(p.read_table('{path}'), '{path.stem}.arrow', compression='uncompressed')\""
        )
    watched = WatchedFile(path)
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Corpus(path, file=watched, rows=_ArrowRows(path))
    return Corpus(path, file=watched, rows=_JsonLines(path, descriptor=watched.descriptor, report=report))


class _JsonLines:
    """One JSON object `{"id", "contents"}` per line."""

    def __init__(self, path: Path, *, descriptor: int, report: Report | None) -> None:
        self._path = path
        self._descriptor = descriptor
        self._starts, self.sidecar = find_line_starts(path, fingerprint=fingerprint(path), report=report)
        self._offsets_file = None if self.sidecar is None else WatchedFile(self.sidecar, size_only=True)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, row: int) -> Document:
        if self._offsets_file is not None:
            self._offsets_file.check()
        start, stop = int(self._starts[row]), int(self._starts[row + 1])
        line = os.pread(self._descriptor, stop - start, start)
        return _parse_line(line, f"{self._path}:{row + 1}")

    def close(self) -> None:
        if self._offsets_file is not None:
            self._offsets_file.close()


class _ArrowRows:
    """Columns `id` and `contents` of an uncompressed Arrow file or stream."""

    sidecar = None

    def __init__(self, path: Path) -> None:
        self._path = path
        table = _map_table(path)
        missing = [name for name in ("id", "contents") if name not in table.column_names]
        if missing:
            raise RetrieverError(
                f"corpus {path} has the columns {table.column_names}, lacks {missing}; "
                "expected 'id' and 'contents'"
            )
        self._ids, self._contents = table["id"], table["contents"]
        for name in ("id", "contents"):
            _check_column(table[name], f"{path}: column {name!r}")

    def __len__(self) -> int:
        return len(self._contents)

    def read(self, row: int) -> Document:
        where = f"{self._path}: row {row + 1}"
        try:
            passage_id, contents = self._ids[row].as_py(), self._contents[row].as_py()
        except UnicodeDecodeError as error:
            raise RetrieverError(f"{where} is not UTF-8 ({error})") from error
        return _make_document(passage_id, contents, where)

    def close(self) -> None:
        """Release the mapping, which goes with the last reference to it."""
        self._ids = self._contents = None


def _map_table(path: Path) -> pa.Table:
    import pyarrow as pa  # a JSONL corpus does not need it

    before = pa.total_allocated_bytes()
    source = pa.memory_map(str(path))
    try:
        with path.open("rb") as file:
            is_stream = file.read(4) == b"\xff\xff\xff\xff"
        table = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise RetrieverError(f"corpus {path} is not readable as Arrow ({error}); write it again") from error
    if pa.total_allocated_bytes() - before > _UNPACKED_BYTES:
        raise RetrieverError(
            f"corpus {path} is compressed, so that it cannot be memory-mapped; rewrite it: "
            'python -c "import pyarrow.feather as f; '
            f"f.write_feather(f.read_table('{path}'), '{path.stem}.arrow', compression='uncompressed')\""
        )
    return table


def _check_column(column: pa.ChunkedArray, where: str) -> None:
    """Raise RetrieverError for another type, and for damaged text offsets, with which Arrow would crash."""
    import pyarrow as pa

    if not (pa.types.is_integer(column.type) or column.type in (pa.string(), pa.large_string())):
        raise RetrieverError(
            f"{where} has the type {column.type}, expected string, large_string or (of 'id') an integer"
        )
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise RetrieverError(f"{where} is damaged ({error}); copy it again") from error


def _parse_line(line: bytes, where: str) -> Document:
    """Parse one line. Raises RetrieverError that starts with `where`."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise RetrieverError(f"{where} is not JSON ({error}): {_shorten(line)}; {_EXPECTED}") from error
    except RecursionError as error:
        raise RetrieverError(f"{where} is JSON nested too deep; {_EXPECTED}") from error
    if not isinstance(fields, dict):
        raise RetrieverError(f"{where} is a JSON {type(fields).__name__}; {_EXPECTED}")
    if "contents" not in fields and "id" in fields:
        raise RetrieverError(f"{where}: no 'contents' among the keys {sorted(fields)[:8]}; {_EXPECTED}")
    return _make_document(fields.get("id"), fields.get("contents"), where)


def _make_document(passage_id: object, contents: object, where: str) -> Document:
    if not isinstance(contents, str) or not contents.strip():
        shown = repr(contents)[:_MAX_SHOWN_CHARS]
        raise RetrieverError(f"{where}: 'contents' is {shown}, expected a non-empty string; {_EXPECTED}")
    if not isinstance(passage_id, str | int) or isinstance(passage_id, bool):
        shown = repr(passage_id)[:_MAX_SHOWN_CHARS]
        raise RetrieverError(f"{where}: 'id' is {shown}, expected a string or an integer; {_EXPECTED}")
    document = Document.model_construct(id=str(passage_id), contents=contents)
    for name, text in (("id", document.id), ("contents", contents)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell lone surrogates; no answer could carry them
            raise RetrieverError(
                f"{where}: '{name}' is not valid Unicode at character {error.start} "
                f"({text[error.start]!a}); {_EXPECTED}"
            ) from error
    return document


def _shorten(line: bytes) -> str:
    text = repr(line[:_MAX_SHOWN_CHARS].decode("utf-8", errors="replace").rstrip("\n"))
    return text + ("..." if len(line) > _MAX_SHOWN_CHARS else "")


def compare_corpus(recorded: FileFacts, *, corpus: Corpus, full: bool = False) -> list[str]:
    """Return one line for every recorded fact that is not the corpus's; `full` reads all of it."""
    pairs: list[tuple[str, object, object]] = [("corpus.bytes", recorded.bytes, corpus.num_bytes)]
    if recorded.bytes == corpus.num_bytes:
        pairs.append(("corpus.fingerprint", recorded.fingerprint, corpus.fingerprint))
        if full:
            pairs.append(("corpus.sha256", recorded.sha256, corpus.sha256))
    return compare_facts(pairs, fix="pass --corpus_path of the corpus that the index was built from")


def sample_rows(count: int, *, size: int) -> list[int]:
    """Return at most `size` rows, evenly spaced over all `count`."""
    return np.unique(np.linspace(0, count - 1, num=min(size, count)).astype(np.int64)).tolist()

"""Passages by row number, read from a file: JSON lines, or Arrow (uncompressed, memory-mapped).

Nothing of the text is held in memory, and of a large JSONL file not even the line offsets: those lie in a
memory-mapped sidecar (see line_offsets.py). Lines are parsed when they are asked for. A file that was changed
since it was opened is noticed at every look (see watched_file.py).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from search_r1.search.errors import RetrieverError
from search_r1.search.fingerprint import fingerprint
from search_r1.search.line_offsets import find_line_starts, is_checked, mark_checked
from search_r1.search.schema import Document
from search_r1.search.watched_file import WatchedFile
from serving.files import sha256_of_file

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_LINES_PER_REPORT = 250_000
_EXPECTED = 'expected one JSON object like {"id": "0", "contents": "\\"Title\\"\\ntext"}'
_SHOWN = 60
# Compressed columns are unpacked into memory as they are opened; mapped ones take next to nothing.
_UNPACKED_BYTES = 1 << 20

Report = Callable[[int, int], None]


class Corpus(Protocol):
    """Passages by row."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Document:
        """Raises IndexError; RetrieverError that names file and line when the passage is malformed, and
        ChangedFileError when the file is not the one that was opened."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        ...

    @property
    def fingerprint(self) -> str:
        """See fingerprint.py; cheap."""
        ...

    @property
    def sha256(self) -> str:
        """Of the whole file, read when first asked for."""
        ...

    def check(self, report: Report | None = None) -> None:
        """Look at every passage; raises RetrieverError at the first malformed one."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_corpus(path: Path, *, report: Report | None = None) -> Corpus:
    """The corpus of this file, by its first bytes; raises RetrieverError when it is no such file.

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
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ArrowCorpus(path)
    return JsonlCorpus(path, report=report)


class _CorpusFile:
    """What is known of a corpus without looking into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = WatchedFile(path)
        self.num_bytes = path.stat().st_size

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.path)

    @cached_property
    def sha256(self) -> str:
        return sha256_of_file(self.path)


class JsonlCorpus(_CorpusFile):
    """One JSON object `{"id", "contents"}` per line. Use `open_corpus`."""

    def __init__(self, path: Path, *, report: Report | None = None) -> None:
        super().__init__(path)
        self._starts, self._sidecar = find_line_starts(path, fingerprint=self.fingerprint, report=report)
        sidecar = self._sidecar
        self._offsets_file = None if sidecar is None else WatchedFile(sidecar, size_only=True)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> Document:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        if self._offsets_file is not None:
            self._offsets_file.check()
        start, stop = int(self._starts[row]), int(self._starts[row + 1])
        line = os.pread(self._file.descriptor, stop - start, start)
        self._file.check()
        return parse_line(line, f"{self.path}:{row + 1}")

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    def check(self, report: Report | None = None) -> None:
        """About 5 microseconds a line. A large file is remembered as checked, beside its line offsets."""
        if is_checked(self._sidecar):
            return
        _check_rows(self, report)
        mark_checked(self._sidecar)

    def close(self) -> None:
        self._file.close()
        if self._offsets_file is not None:
            self._offsets_file.close()


class ArrowCorpus(_CorpusFile):
    """Columns `id` and `contents` of an uncompressed Arrow file or stream. Use `open_corpus`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
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

    def __getitem__(self, row: int) -> Document:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        self._file.check()
        where = f"{self.path}: row {row + 1}"
        try:
            passage_id, contents = self._ids[row].as_py(), self._contents[row].as_py()
        except UnicodeDecodeError as error:
            raise RetrieverError(f"{where} is not UTF-8 ({error})") from error
        return _make_document(passage_id, contents, where)

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    def check(self, report: Report | None = None) -> None:
        _check_rows(self, report)

    def close(self) -> None:
        """The mapping goes with the last look at it."""
        self._file.close()
        self._ids = self._contents = None


def _map_table(path: Path) -> pa.Table:
    import pyarrow as pa  # here: a JSONL corpus does without

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
    """Arrow follows damaged offsets wherever they lead, and the process dies of it."""
    import pyarrow as pa

    known = {pa.string(): np.int32, pa.large_string(): np.int64}
    if pa.types.is_integer(column.type):
        return
    if column.type not in known:
        raise RetrieverError(
            f"{where} has the type {column.type}, expected string, large_string or (of 'id') an integer"
        )
    for chunk in column.chunks:
        _, offsets, text = chunk.buffers()
        found = np.frombuffer(offsets, known[column.type])[chunk.offset : chunk.offset + len(chunk) + 1]
        size = text.size if text is not None else 0
        if len(found) and (found[0] < 0 or found[-1] > size or (found[1:] < found[:-1]).any()):
            raise RetrieverError(f"{where} is damaged: its texts do not follow each other; copy it again")


def _check_rows(corpus: JsonlCorpus | ArrowCorpus, report: Report | None) -> None:
    for count, _ in enumerate(corpus, start=1):
        if report is not None and (count % _LINES_PER_REPORT == 0 or count == len(corpus)):
            report(count, len(corpus))


def parse_line(line: bytes, where: str) -> Document:
    """Raises RetrieverError that starts with `where`."""
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
        shown = repr(contents)[:_SHOWN]
        raise RetrieverError(f"{where}: 'contents' is {shown}, expected a non-empty string; {_EXPECTED}")
    if not isinstance(passage_id, str | int) or isinstance(passage_id, bool):
        shown = repr(passage_id)[:_SHOWN]
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
    text = repr(line[:_SHOWN].decode("utf-8", errors="replace").rstrip("\n"))
    return text + ("..." if len(line) > _SHOWN else "")


def sample_rows(count: int, *, size: int) -> list[int]:
    """At most `size` rows, evenly spaced over all `count`."""
    return np.unique(np.linspace(0, count - 1, num=min(size, count)).astype(np.int64)).tolist()

"""Faiss files: what is in them, and their search where Faiss does it best (lists, graphs, bits, GPUs).

Every kind stays memory-mapped with IO_FLAG_MMAP_IFC of Faiss 1.15; IO_FLAG_MMAP maps inverted lists only.
"""

from __future__ import annotations

import mmap as memory_map
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from search_r1.search.clustering import find_nearest
from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import SCANNED_KINDS, IndexKind, SearchOptions
from search_r1.search.ranking import FloatArray, RowArray, order_hits

FAISS_VERSION: str = faiss.__version__

_SCALAR_KINDS = {
    faiss.ScalarQuantizer.QT_fp16: IndexKind.FP16,
    faiss.ScalarQuantizer.QT_8bit: IndexKind.SQ8,
}
_GPU_KINDS = (IndexKind.FLAT, IndexKind.IVF, IndexKind.IVF_PQ)
_SUPPORTED = (
    "IndexFlatIP, IndexScalarQuantizer of fp16 or 8 bits, IndexIVFFlat, IndexIVFScalarQuantizer, IndexIVFPQ,"
    " IndexHNSWFlat, IndexHNSWSQ and IndexLSH"
)


def set_num_threads(count: int) -> None:
    """Of Faiss in the whole process."""
    faiss.omp_set_num_threads(count)


def read_kind(path: Path) -> IndexKind:
    """Raises RetrieverError when the file is no Faiss index or of a kind or metric not searched here."""
    return _classify(_read(path, mmap=True), path)


class CodeRows:
    """Whole vectors of a `flat`, `fp16` or `sq8` file, read block by block or row by row."""

    def __init__(self, codec: faiss.IndexFlatCodes, *, codes: npt.NDArray[np.uint8], kind: IndexKind) -> None:
        """`codes`: [rows, bytes] as Faiss encodes them; `codec` decodes them."""
        self.kind = kind
        self.dim = int(codec.d)
        self._codec = codec
        self._codes = codes

    def __len__(self) -> int:
        return len(self._codes)

    def read(self, start: int, stop: int, *, out: FloatArray) -> FloatArray:
        """Rows `start` to `stop` [stop - start, dim]: a view of the file or what was decoded into `out`.

        The view may start at any byte: only torch takes such memory as it is.
        """
        codes = self._codes[start:stop]
        if self.kind is IndexKind.FLAT:
            return codes.view(np.float32)
        return self._codec.sa_decode(codes, out[: stop - start])

    def gather(self, rows: RowArray) -> FloatArray:
        """[len(rows), dim]"""
        return self._codec.sa_decode(self._codes[rows]) if len(rows) else np.empty((0, self.dim), np.float32)


def open_rows(path: Path, *, mmap: bool, scattered: bool = False) -> CodeRows:
    """Raises RetrieverError when the file does not hold whole vectors or is cut short.

    `scattered`: rows will be read here and there, so that reading ahead would waste the disk.
    """
    codec, kind = _open_codec(path)
    count, code_size = int(codec.ntotal), int(codec.code_size)
    codes = _map_tail(path, num_bytes=count * code_size, mmap=mmap, scattered=scattered)
    return CodeRows(codec, codes=codes.reshape(count, code_size), kind=kind)


class StoredVectors:
    """The same as a VectorSource: read from the file and not mapped, so that memory holds one block."""

    def __init__(self, path: Path) -> None:
        """Raises RetrieverError when the file does not hold whole vectors or is cut short."""
        self._codec, _ = _open_codec(path)
        self._path = path
        self._code_size = int(self._codec.code_size)
        self.shape = (int(self._codec.ntotal), int(self._codec.d))
        self._offset = path.stat().st_size - self.shape[0] * self._code_size

    def __getitem__(self, rows: slice) -> FloatArray:
        """[rows, dim]"""
        start, stop, step = rows.indices(self.shape[0])
        codes = np.fromfile(
            self._path,
            dtype=np.uint8,
            count=max(0, stop - start) * self._code_size,
            offset=self._offset + start * self._code_size,
        )
        return self._codec.sa_decode(codes.reshape(-1, self._code_size))[::step]


def _open_codec(path: Path) -> tuple[faiss.IndexFlatCodes, IndexKind]:
    """The mapped index of a file that holds whole vectors, none missing."""
    index = _read(path, mmap=True)
    kind = _classify(index, path)
    if kind not in SCANNED_KINDS:
        raise RetrieverError(f"index {path} is of kind {kind}, which does not hold whole vectors")
    if int(index.codes.size()) != int(index.ntotal) * int(index.code_size):
        raise RetrieverError(
            f"index {path} is damaged: it announces {index.ntotal} vectors and holds others; rebuild it"
        )
    return index, kind


def _map_tail(path: Path, *, num_bytes: int, mmap: bool, scattered: bool) -> npt.NDArray[np.uint8]:
    """The last `num_bytes` of a file: there Faiss writes the codes."""
    offset = path.stat().st_size - num_bytes
    if not mmap:
        return np.fromfile(path, dtype=np.uint8, offset=offset, count=num_bytes)
    with path.open("rb") as file:
        mapped = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ)
    mapped.madvise(memory_map.MADV_RANDOM if scattered else memory_map.MADV_SEQUENTIAL)
    return np.frombuffer(mapped, dtype=np.uint8, offset=offset, count=num_bytes)


class FaissIndex:
    """An index that Faiss searches."""

    def __init__(
        self, index: faiss.Index, *, kind: IndexKind, search: SearchOptions, device: str, mmap: bool
    ) -> None:
        self.kind = kind
        self.dim = int(index.d)
        self._index = index
        self._search = search
        self._device = device
        self._mmap = mmap
        self._lists = _read_lists(index, search) if kind in (IndexKind.IVF, IndexKind.IVF_PQ) else None
        if self._lists is not None:
            index.nprobe = self._lists.nprobe

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, vectors: FloatArray, *, topk: int) -> tuple[FloatArray, RowArray]:
        """As VectorIndex; of a `binary` index the scores are Hamming distances, negated."""
        num_found = min(topk, len(self))
        if not len(vectors) or not num_found:
            return order_hits(
                np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64), topk=topk
            )
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        scores, rows = self._find(vectors, num_found)
        if rows.min() < -1 or rows.max() >= len(self):
            wrong = rows[(rows < -1) | (rows >= len(self))][0]
            raise RetrieverError(
                f"index is damaged: it found row {wrong} of {len(self)}; look at it with index verify,"
                " and copy or build it again"
            )
        return order_hits(-scores if self.kind is IndexKind.BINARY else scores, rows, topk=topk)

    def describe(self) -> dict[str, str | int]:
        facts: dict[str, str | int] = {
            "kind": str(self.kind),
            "count": len(self),
            "dim": self.dim,
            "device": self._device,
            "mmap": int(self._mmap),
        }
        if self._lists is not None:
            facts |= {"num_lists": self._lists.count, "nprobe": self._lists.nprobe}
        if self.kind is IndexKind.HNSW:
            facts["ef_search"] = self._search.choose_ef_search(1)
        return facts

    def _find(self, vectors: FloatArray, num_found: int) -> tuple[FloatArray, RowArray]:
        if self.kind is IndexKind.HNSW:
            parameters = faiss.SearchParametersHNSW(efSearch=self._search.choose_ef_search(num_found))
            return self._index.search(vectors, num_found, params=parameters)
        if self._lists is None or self._lists.centroids is None:
            return self._index.search(vectors, num_found)
        near, lists = find_nearest(vectors, self._lists.centroids, num_found=self._lists.nprobe)
        return self._index.search_preassigned(vectors, num_found, lists, near)


@dataclass(frozen=True, slots=True)
class _Lists:
    """Of an inverted file."""

    count: int
    nprobe: int
    centroids: FloatArray | None
    """None: only Faiss can find the lists (they are not in a flat index, or on a GPU)."""


def _read_lists(index: faiss.Index, search: SearchOptions) -> _Lists:
    count = int(index.nlist)
    on_cpu = isinstance(index, faiss.IndexIVF) and isinstance(
        faiss.downcast_index(index.quantizer), faiss.IndexFlat
    )
    centroids = index.quantizer.reconstruct_n(0, count) if on_cpu else None
    return _Lists(count=count, nprobe=search.choose_nprobe(count), centroids=centroids)


def open_faiss(path: Path, *, mmap: bool, on_gpu: bool, search: SearchOptions) -> FaissIndex:
    """Raises RetrieverError when the file cannot be read, or not be searched on a GPU."""
    index = _read(path, mmap=mmap)
    kind = _classify(index, path)
    if not on_gpu:
        return FaissIndex(index, kind=kind, search=search, device="cpu", mmap=mmap)
    if kind not in _GPU_KINDS:
        raise RetrieverError(
            f"index {path} is of kind {kind}; Faiss searches {', '.join(_GPU_KINDS)} on GPUs:"
            " leave --faiss_gpu out, or use --index_device torch for fp16 and sq8"
        )
    return FaissIndex(_move_to_gpus(index), kind=kind, search=search, device="faiss_gpu", mmap=False)


def _read(path: Path, *, mmap: bool) -> faiss.Index:
    flags = faiss.IO_FLAG_MMAP_IFC if mmap else 0
    try:
        index = faiss.read_index(str(path), flags)
        if mmap and isinstance(index, faiss.IndexIVF):
            # Reading the other way compares the lists with the length of the file, which this way does not.
            faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        return index
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise RetrieverError(f"index {path} is not a readable Faiss index ({reason}); rebuild it") from error


def _classify(index: faiss.Index, path: Path) -> IndexKind:
    kind = _find_kind(index)
    if kind is None:
        raise RetrieverError(
            f"index {path} is a Faiss {type(index).__name__}, which is not searched here; expected one of"
            f" {_SUPPORTED}"
        )
    if kind is not IndexKind.BINARY and index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RetrieverError(
            f"index {path} has Faiss metric {index.metric_type}, expected inner_product"
            f" ({faiss.METRIC_INNER_PRODUCT}); rebuild it"
        )
    if not index.is_trained:
        raise RetrieverError(f"index {path} was never trained; rebuild it")
    return kind


def _find_kind(index: faiss.Index) -> IndexKind | None:
    if isinstance(index, faiss.IndexScalarQuantizer):
        return _SCALAR_KINDS.get(index.sq.qtype)
    if isinstance(index, faiss.IndexIVFPQ):
        return IndexKind.IVF_PQ
    if isinstance(index, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer):
        return IndexKind.IVF
    if isinstance(index, faiss.IndexHNSWFlat | faiss.IndexHNSWSQ):
        return IndexKind.HNSW
    if isinstance(index, faiss.IndexLSH):
        return IndexKind.BINARY
    return IndexKind.FLAT if isinstance(index, faiss.IndexFlat) else None


def _move_to_gpus(index: faiss.Index) -> faiss.Index:
    if faiss.get_num_gpus() == 0:
        raise RetrieverError(
            "--faiss_gpu: this Faiss build sees no GPU; install a GPU build of Faiss,"
            " use --index_device torch, or leave the flag out"
        )
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, co=options)

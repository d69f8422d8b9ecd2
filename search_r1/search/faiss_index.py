"""Faiss files: write one from a stream of vectors, read what is in one, search one. The only Faiss import.

Every kind stays memory-mapped with IO_FLAG_MMAP_IFC of Faiss 1.15; IO_FLAG_MMAP maps inverted lists only.
"""

from __future__ import annotations

import mmap as memory_map
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import SCANNED_KINDS, IndexKind, IndexOptions, SearchOptions
from search_r1.search.ranking import (
    FloatArray,
    RowArray,
    VectorSource,
    order_hits,
    read_blocks,
    sample_vectors,
)
from serving.files import replacing_file

FAISS_VERSION: str = faiss.__version__

_BLOCK_BYTES = 1 << 26
"""Of a block of float32 vectors while an index is written."""
_SCALAR_SAMPLE_ROWS = 100_000
_ROWS_PER_CENTROID = 48
_EF_CONSTRUCTION = 80
_SCALAR_KINDS = {
    faiss.ScalarQuantizer.QT_fp16: IndexKind.FP16,
    faiss.ScalarQuantizer.QT_8bit: IndexKind.SQ8,
}
_REFINED_PER_RESULT = 10
_MIN_REFINED = 64
"""Candidates of a refined index whose whole vectors are compared, also for one result."""
_REFINED_BLOCK_ROWS = 8192
"""Whole vectors that are decoded at once; Faiss reads more than 1000 with all threads."""
_GPU_KINDS = (IndexKind.FLAT, IndexKind.IVF_PQ)
_SUPPORTED = (
    "IndexFlatIP, IndexScalarQuantizer of fp16 or 8 bits, IndexIVFPQ, IndexRefine of that, IndexHNSWFlat, "
    "IndexHNSWSQ"
)


def set_num_threads(count: int) -> None:
    """Set the threads of Faiss and of its matrix products in the whole process."""
    faiss.omp_set_num_threads(count)
    threadpool_limits(count, user_api="blas")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        # Training codebooks takes thousands of small matrix products, which more threads make slower.
        with threadpool_limits(count or 1, user_api="blas"):
            yield
    finally:
        faiss.omp_set_num_threads(before)


def write_index(
    vectors: VectorSource,
    path: Path,
    *,
    options: IndexOptions,
    num_threads: int | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> IndexOptions:
    """Write an index, complete or not at all; return the options with the factory string that was used.

    Trains on a sample and adds block after block. Memory holds the sample, one block and, of `ivf_pq` without
    what is refined and of `hnsw`, the index; codes of whole vectors go to `<path>.codes` and are mapped. The
    same vectors and options give the same file, except `hnsw` with more than one thread.
    `report(phase, done, total)`. Raises RetrieverError for what cannot be built.
    """
    if len(vectors.shape) != 2:
        raise RetrieverError(f"vectors have shape {tuple(vectors.shape)}, expected (rows, dim)")
    report = report or (lambda *_: None)
    options = options.resolve(*vectors.shape)
    codes = path.with_name(path.name + ".codes")
    try:
        with _threads(num_threads):
            index = _make_trained(vectors, options, report)
            mapped = _add(index, vectors, codes=codes, report=report)
        report("write index", 0, 1)
        with replacing_file(path) as partial:
            faiss.write_index(index, str(partial))
            if read_kind(partial) is not options.kind:
                raise RetrieverError(
                    f"index {path} does not read back as {options.kind}; this Faiss is not supported"
                )
        del index, mapped  # in this order: the index has a view of the mapped codes
    finally:
        codes.unlink(missing_ok=True)
    report("write index", 1, 1)
    return options


def _make_trained(
    vectors: VectorSource, options: IndexOptions, report: Callable[[str, int, int], None]
) -> faiss.Index:
    """Return the empty index, trained on a sample where its kind needs it."""
    num_rows, dim = vectors.shape
    try:
        index = faiss.index_factory(dim, options.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise RetrieverError(
            f"Faiss cannot make an index {options.factory!r} of dimension {dim}: {_first_line(error)}"
        ) from error
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = _EF_CONSTRUCTION
    base = _split(index)[0]
    if isinstance(base, faiss.IndexIVFPQ):
        base.do_polysemous_training = False  # takes minutes, for a search mode that is not used here
        # Else Faiss prints a warning for every codebook of a small index.
        base.cp.min_points_per_centroid = base.pq.cp.min_points_per_centroid = 1
    if not index.is_trained:
        num_lists = base.nlist if isinstance(base, faiss.IndexIVF) else 0
        report("train index", 0, 1)
        sample = sample_vectors(vectors, max_rows=max(_SCALAR_SAMPLE_ROWS, _ROWS_PER_CENTROID * num_lists))
        try:
            index.train(sample)
        except RuntimeError as error:  # fewer vectors than centroids
            raise RetrieverError(
                f"Faiss cannot train {options.factory!r} on {num_rows} vectors: {_first_line(error)}"
            ) from error
        report("train index", 1, 1)
    return index


def _split(index: faiss.Index) -> tuple[Any, Any]:
    """Return what vectors are added to, and the IndexFlatCodes of whole vectors; None for either."""
    if isinstance(index, faiss.IndexRefine):
        return faiss.downcast_index(index.base_index), faiss.downcast_index(index.refine_index)
    return (None, index) if isinstance(index, faiss.IndexFlatCodes) else (index, None)


def _add(
    index: faiss.Index, vectors: VectorSource, *, codes: Path, report: Callable[[str, int, int], None]
) -> npt.NDArray[np.uint8] | None:
    """Add all vectors; whole ones are encoded into the file `codes`, whose mapping is returned.

    The index has a view of the mapping, which must exist as long as the index does.
    """
    num_rows, dim = vectors.shape
    base, stored = _split(index)
    with codes.open("wb") as file:
        for first, block in read_blocks(vectors, num_rows=max(1, _BLOCK_BYTES // (4 * dim))):
            if base is not None:
                base.add(block)
            if stored is not None:
                file.write(stored.sa_encode(block).data)
            report("add vectors", first + len(block), num_rows)
    if stored is None:
        return None
    mapped = np.memmap(codes, dtype=np.uint8, mode="r")
    vector = faiss.MaybeOwnedVectorUInt8
    stored.codes = vector.create_view(faiss.swig_ptr(mapped), mapped.size, vector().owner)
    stored.ntotal = index.ntotal = num_rows
    return mapped


def read_kind(path: Path) -> IndexKind:
    """Return the kind of a file. Raises RetrieverError if it is no Faiss index or not one searched here."""
    return _classify(_read(path, mmap=True), path)


class StoredVectors:
    """The whole vectors of a `flat`, `fp16` or `sq8` file: a VectorSource and VectorRows."""

    def __init__(self, path: Path, *, mmap: bool = True) -> None:
        """Map the file. Raises RetrieverError when it does not hold whole vectors or is truncated."""
        self._codec = _read(path, mmap=True)
        self.kind = _classify(self._codec, path)
        if self.kind not in SCANNED_KINDS:
            raise RetrieverError(f"index {path} is of kind {self.kind}, which does not hold whole vectors")
        count, code_size = int(self._codec.ntotal), int(self._codec.code_size)
        if int(self._codec.codes.size()) != count * code_size:
            raise RetrieverError(
                f"index {path} is damaged: its header names {count} vectors, it holds others; rebuild it"
            )
        self.dim = int(self._codec.d)
        self._codes = _map_tail(path, num_bytes=count * code_size, mmap=mmap).reshape(count, code_size)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, dim)."""
        return len(self._codes), self.dim

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, rows: slice) -> FloatArray:
        """Return [rows, dim], decoded."""
        return self._codec.sa_decode(np.ascontiguousarray(self._codes[rows]))

    def read(self, start: int, stop: int, *, out: FloatArray) -> FloatArray:
        """Return rows `start` to `stop` [stop - start, dim]: a view of the file, or decoded into `out`.

        The view may start at any byte: only torch accepts such memory as it is.
        """
        codes = self._codes[start:stop]
        if self.kind is IndexKind.FLAT:
            return codes.view(np.float32)
        return self._codec.sa_decode(codes, out[: stop - start])

    def gather(self, rows: RowArray) -> FloatArray:
        """Return [len(rows), dim]."""
        return self._codec.sa_decode(self._codes[rows]) if len(rows) else np.empty((0, self.dim), np.float32)


def _map_tail(path: Path, *, num_bytes: int, mmap: bool) -> npt.NDArray[np.uint8]:
    """Return the last `num_bytes` of a file, where Faiss writes the codes."""
    offset = path.stat().st_size - num_bytes
    if not mmap:
        return np.fromfile(path, dtype=np.uint8, offset=offset, count=num_bytes)
    with path.open("rb") as file:
        mapped = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ)
    mapped.madvise(memory_map.MADV_SEQUENTIAL)
    return np.frombuffer(mapped, dtype=np.uint8, offset=offset, count=num_bytes)


class FaissIndex:
    """A VectorIndex that Faiss searches. Whole vectors that refine the result stay where they are."""

    def __init__(
        self,
        index: faiss.Index,
        *,
        path: Path,
        kind: IndexKind,
        search: SearchOptions,
        mmap: bool,
        move: Callable[[faiss.Index], faiss.Index] | None = None,
    ) -> None:
        """Search on the CPU, or on the GPUs to which `move` copies what is searched."""
        self.kind = kind
        self.dim = int(index.d)
        self._file = index  # owns the parts below
        self._path = path
        self._search = search
        parts: tuple[Any, Any] = _split(index) if isinstance(index, faiss.IndexRefine) else (index, None)
        self._searched, self._whole = parts
        self._facts: dict[str, str | int] = {"device": "cpu", "mmap": int(mmap)}
        if kind is IndexKind.IVF_PQ:
            lists = self._searched
            lists.nprobe = search.choose_nprobe(int(lists.nlist))  # before it is moved: copies have the same
            self._facts |= {"num_lists": int(lists.nlist), "nprobe": int(lists.nprobe)}
        if kind is IndexKind.HNSW:
            self._facts["ef_search"] = search.choose_ef_search(1)
        if move is not None:
            self._searched = move(self._searched)
            self._facts |= {"device": "faiss_gpu", "mmap": int(mmap and self._whole is not None)}
            self._file = index if self._whole is not None else None

    def __len__(self) -> int:
        return int(self._searched.ntotal)

    def search(self, vectors: FloatArray, *, topk: int) -> tuple[FloatArray, RowArray]:
        """Search as VectorIndex does. Raises RetrieverError where the index is damaged."""
        num_found = min(topk, len(self))
        if self._whole is not None:
            num_found = min(max(_MIN_REFINED, _REFINED_PER_RESULT * num_found), len(self))
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if not len(vectors) or not num_found:
            shape = (len(vectors), 0)
            return order_hits(np.empty(shape, np.float32), np.empty(shape, np.int64), topk=topk)
        parameters = None
        if self.kind is IndexKind.HNSW:
            parameters = faiss.SearchParametersHNSW(efSearch=self._search.choose_ef_search(num_found))
        scores, rows = self._searched.search(vectors, num_found, params=parameters)
        if rows.min() < -1 or rows.max() >= len(self):
            wrong = rows[(rows < -1) | (rows >= len(self))][0]
            raise RetrieverError(
                f"index {self._path} is damaged: a search found row {wrong} of {len(self)}; check it with "
                "`index verify`, and copy or build it again"
            )
        if self._whole is not None:
            scores = self._refine(vectors, rows)
        return order_hits(scores, rows, topk=topk)

    def _refine(self, vectors: FloatArray, rows: RowArray) -> FloatArray:
        """Return the inner products [n, k] of queries [n, dim] and the whole vectors of their candidates.

        Row -1 has the product of row 0. Faiss would read the rows of a damaged index without a check.
        """
        scores = np.empty(rows.shape, np.float32)
        step = max(1, _REFINED_BLOCK_ROWS // rows.shape[1])
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            found = self._whole.reconstruct_batch(block.clip(min=0).ravel()).reshape(*block.shape, -1)
            scores[start : start + step] = np.einsum("nkd,nd->nk", found, vectors[start : start + step])
        return scores

    def describe(self) -> dict[str, str | int]:
        """Return kind, size and what the answers depend on."""
        return {"kind": str(self.kind), "count": len(self), "dim": self.dim, **self._facts}


def open_faiss(path: Path, *, mmap: bool, on_gpu: bool, search: SearchOptions) -> FaissIndex:
    """Open a file for search by Faiss. Raises RetrieverError if it is damaged or not for a GPU."""
    index = _read(path, mmap=mmap)
    kind = _classify(index, path)
    if on_gpu and kind not in _GPU_KINDS:
        raise RetrieverError(
            f"index {path} is of kind {kind}; Faiss searches {', '.join(_GPU_KINDS)} on GPUs: "
            "leave --faiss_gpu out, or use --index_device torch for fp16 and sq8"
        )
    move = _move_to_gpus if on_gpu else None
    return FaissIndex(index, path=path, kind=kind, search=search, mmap=mmap, move=move)


def _read(path: Path, *, mmap: bool) -> faiss.Index:
    flags = faiss.IO_FLAG_MMAP_IFC if mmap else 0
    try:
        index = faiss.read_index(str(path), flags)
        if mmap and isinstance(index, faiss.IndexIVF):
            # Reading with this flag compares the lists with the length of the file; the other does not.
            faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        return index
    except (RuntimeError, MemoryError) as error:
        raise RetrieverError(
            f"index {path} is not a readable Faiss index ({_first_line(error)}); rebuild it"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


def _classify(index: faiss.Index, path: Path) -> IndexKind:
    kind = _find_kind(index)
    if kind is None:
        raise RetrieverError(
            f"index {path} is a Faiss {type(index).__name__}, which is not searched here; expected one of "
            f"{_SUPPORTED}"
        )
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RetrieverError(
            f"index {path} has Faiss metric {index.metric_type}, expected inner_product "
            f"({faiss.METRIC_INNER_PRODUCT}); rebuild it"
        )
    if not index.is_trained:
        raise RetrieverError(f"index {path} was never trained; rebuild it")
    return kind


def _find_kind(index: faiss.Index) -> IndexKind | None:
    if isinstance(index, faiss.IndexScalarQuantizer):
        return _SCALAR_KINDS.get(index.sq.qtype)
    if isinstance(index, faiss.IndexRefine):
        base, stored = _split(index)
        is_searched = _find_kind(base) is IndexKind.IVF_PQ and isinstance(stored, faiss.IndexFlatCodes)
        return IndexKind.IVF_PQ if is_searched else None
    if isinstance(index, faiss.IndexIVFPQ):
        return IndexKind.IVF_PQ
    if isinstance(index, faiss.IndexHNSWFlat | faiss.IndexHNSWSQ):
        return IndexKind.HNSW
    return IndexKind.FLAT if isinstance(index, faiss.IndexFlat) else None


def _move_to_gpus(index: faiss.Index) -> faiss.Index:
    if faiss.get_num_gpus() == 0:
        raise RetrieverError(
            "--faiss_gpu: this Faiss build sees no GPU; install a GPU build of Faiss, "
            "use --index_device torch, or leave the flag out"
        )
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, co=options)

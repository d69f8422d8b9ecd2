"""Writing Faiss indexes from a stream of vectors, within the memory of the finished index.

`flat`, `fp16`, `sq8` and `binary` files end with their codes: the codes are written block after block behind
the header of an empty index. `ivf`, `ivf_pq` and `hnsw` are made in memory; room for exactly what will come
is reserved first, because a growing vector would hold up to three times its size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import faiss
import numpy as np
import numpy.typing as npt
import torch

from search_r1.search.clustering import find_nearest, train_centroids, train_codebooks
from search_r1.search.errors import RetrieverError
from search_r1.search.faiss_index import read_kind
from search_r1.search.kinds import IndexKind, IndexOptions, Storage
from search_r1.search.ranking import FloatArray
from search_r1.search.sizes import SCALAR_SAMPLE_ROWS, count_bytes
from search_r1.search.vector_index import Report, locate_vectors
from search_r1.search.vector_source import VectorSource, read_blocks, sample_rows

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 26
"""Of a block of vectors as float32."""
_PQ_SAMPLE_ROWS = 16_384
"""64 for each of the 256 centroids of a codebook."""
_RESIDUAL_SAMPLE_ROWS = 65_536
_SCALAR_TYPES = {
    Storage.FP16: faiss.ScalarQuantizer.QT_fp16,
    Storage.SQ8: faiss.ScalarQuantizer.QT_8bit,
}
_STORAGE_OF_KIND = {
    IndexKind.FLAT: Storage.FLAT,
    IndexKind.FP16: Storage.FP16,
    IndexKind.SQ8: Storage.SQ8,
}
_COUNT_OFFSET = 8
"""Of the number of vectors, int64, in the header of an index file: after four letters and the dimension."""


def write_files(
    vectors: VectorSource,
    path: Path,
    *,
    options: IndexOptions,
    num_threads: int | None,
    report: Report | None,
) -> IndexOptions:
    """See `vector_index.write_index`."""
    if len(vectors.shape) != 2:
        raise RetrieverError(f"vectors have shape {tuple(vectors.shape)}, expected (rows, dim)")
    options = options.resolve(*vectors.shape)
    with _threads(num_threads):
        _Writer(vectors, path, options=options, report=report or _ignore).write()
    return options


class _Writer:
    """One index on its way to disk."""

    def __init__(self, vectors: VectorSource, path: Path, *, options: IndexOptions, report: Report) -> None:
        self._vectors = vectors
        self._path = path
        self._options = options
        self._report = report
        self._num_rows, self._dim = vectors.shape
        self._sample_rows = count_bytes(options, self._num_rows, self._dim).trained_on // (4 * self._dim)
        self._block_rows = max(1, _BLOCK_BYTES // (4 * self._dim))

    def write(self) -> None:
        """Both files complete as `.partial` first; then the old ones go, then the new ones come."""
        targets = [self._path]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partials = [self._name_partial(self._path)]
        self._write_main(partials[0])
        rescored_by = self._options.rescore_storage
        side = locate_vectors(self._path)
        if rescored_by not in (None, Storage.NONE):
            targets.append(side)
            partials.append(self._name_partial(side))
            self._stream(self._make_codec(rescored_by), partials[1], phase="vectors for rescoring")
        side.unlink(missing_ok=True)
        for partial, target in zip(reversed(partials), reversed(targets), strict=True):
            os.replace(partial, target)

    def _write_main(self, partial: Path) -> None:
        kind = self._options.kind
        if kind is IndexKind.BINARY:
            self._stream(self._make_bits(), partial, phase="bits")
        elif kind in _STORAGE_OF_KIND:
            self._stream(self._make_codec(_STORAGE_OF_KIND[kind]), partial, phase="vectors")
        else:
            make = self._make_graph if kind is IndexKind.HNSW else self._make_lists
            index = make()
            self._report("writing", 0, 1)
            faiss.write_index(index, str(partial))
            _sync(partial)
            self._report("writing", 1, 1)
        if read_kind(partial) is not kind:
            raise RetrieverError(
                f"index {self._path} does not read back as {kind}; this Faiss is not supported"
            )

    def _stream(self, empty: faiss.IndexFlatCodes, partial: Path, *, phase: str) -> None:
        """The file that `faiss.write_index` would write if `empty` held all vectors."""
        header = bytearray(faiss.serialize_index(empty).tobytes())
        header[_COUNT_OFFSET : _COUNT_OFFSET + 8] = np.int64(self._num_rows).tobytes()
        # The length of the codes ends the header: of a flat index in floats, of any other in bytes.
        width = 4 if isinstance(empty, faiss.IndexFlat) else 1
        header[-8:] = np.int64(self._num_rows * empty.sa_code_size() // width).tobytes()
        with partial.open("wb") as file:
            file.write(header)
            for first, block in read_blocks(self._vectors, num_rows=self._block_rows):
                _write_codes(file, empty.sa_encode(block))
                self._report(phase, first + len(block), self._num_rows)
            file.flush()
            os.fsync(file.fileno())

    def _make_codec(self, storage: Storage) -> faiss.IndexFlatCodes:
        """An empty trained index."""
        if storage is Storage.FLAT:
            return faiss.IndexFlatIP(self._dim)
        codec = faiss.IndexScalarQuantizer(self._dim, _SCALAR_TYPES[storage], faiss.METRIC_INNER_PRODUCT)
        codec.train(self._sample(SCALAR_SAMPLE_ROWS))
        return codec

    def _make_bits(self) -> faiss.IndexLSH:
        """One bit per component: whether it is above its median. Signs alone say little of vectors that lie
        to one side of the origin, as those of most text encoders do."""
        bits = faiss.IndexLSH(self._dim, self._dim, False, True)
        bits.train(self._sample(SCALAR_SAMPLE_ROWS // 2))  # Faiss makes a second copy
        return bits

    def _make_lists(self) -> faiss.IndexIVF:
        options = self._options
        count = options.num_lists or 1
        sample = self._sample(self._sample_rows)
        centroids = train_centroids(
            sample,
            count=count,
            seed=options.seed,
            report=lambda done, total: self._report("clustering", done, total),
        )
        quantizer = faiss.IndexFlatIP(self._dim)
        quantizer.add(centroids)
        index = self._make_empty_lists(quantizer, sample=sample, centroids=centroids)
        del sample
        assigned = self._assign(centroids)
        sizes = np.bincount(assigned, minlength=count)
        for number, size in enumerate(sizes.tolist()):
            index.invlists.resize(number, size)
            index.invlists.resize(number, 0)
        for first, block in read_blocks(self._vectors, num_rows=self._block_rows):
            lists = assigned[first : first + len(block)].astype(np.int64)
            index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(lists))
            self._report("adding", first + len(block), self._num_rows)
        return index

    def _make_empty_lists(
        self, quantizer: faiss.IndexFlat, *, sample: FloatArray, centroids: FloatArray
    ) -> faiss.IndexIVF:
        """Trained, with the quantizer in its possession."""
        options, count = self._options, len(centroids)
        metric = faiss.METRIC_INNER_PRODUCT
        if options.kind is IndexKind.IVF and options.storage is Storage.FLAT:
            index = faiss.IndexIVFFlat(quantizer, self._dim, count, metric)
        elif options.kind is IndexKind.IVF:
            scalar_type = _SCALAR_TYPES[options.storage or Storage.SQ8]
            index = faiss.IndexIVFScalarQuantizer(quantizer, self._dim, count, scalar_type, metric)
            residuals = self._take_residuals(sample, centroids, count=_RESIDUAL_SAMPLE_ROWS)
            index.train_encoder(len(residuals), faiss.swig_ptr(residuals), None)
        else:
            index = faiss.IndexIVFPQ(quantizer, self._dim, count, options.pq_bytes or 1, 8, metric)
            self._train_product(index, sample=sample, centroids=centroids)
        index.is_trained = True
        index.own_fields = True
        quantizer.this.disown()
        return index

    def _train_product(self, index: faiss.IndexIVFPQ, *, sample: FloatArray, centroids: FloatArray) -> None:
        residuals = self._take_residuals(sample, centroids, count=_PQ_SAMPLE_ROWS)
        books = train_codebooks(
            residuals,
            num_parts=int(index.pq.M),
            seed=self._options.seed,
            report=lambda done, total: self._report("codebooks", done, total),
        )
        faiss.copy_array_to_vector(books.reshape(-1), index.pq.centroids)

    def _take_residuals(self, sample: FloatArray, centroids: FloatArray, *, count: int) -> FloatArray:
        """Some vectors of the sample, less the nearest centroid of each."""
        chosen = np.random.default_rng(self._options.seed).permutation(len(sample))[:count]
        vectors = sample[np.sort(chosen)]
        _, nearest = find_nearest(vectors, centroids, num_found=1)
        vectors -= centroids[nearest[:, 0]]
        return vectors

    def _assign(self, centroids: FloatArray) -> npt.NDArray[np.int32]:
        assigned = np.empty(self._num_rows, dtype=np.int32)
        for first, block in read_blocks(self._vectors, num_rows=self._block_rows):
            _, nearest = find_nearest(block, centroids, num_found=1)
            assigned[first : first + len(block)] = nearest[:, 0]
            self._report("assigning", first + len(block), self._num_rows)
        return assigned

    def _make_graph(self) -> faiss.IndexHNSW:
        options = self._options
        links = options.num_links or 1
        metric = faiss.METRIC_INNER_PRODUCT
        if options.storage is Storage.FLAT:
            index = faiss.IndexHNSWFlat(self._dim, links, metric)
        else:
            scalar_type = _SCALAR_TYPES[options.storage or Storage.SQ8]
            index = faiss.IndexHNSWSQ(self._dim, scalar_type, links, metric)
            index.train(self._sample(SCALAR_SAMPLE_ROWS))
        index.hnsw.efConstruction = options.ef_construction or 1
        self._reserve_graph(index, links=links)
        # Small blocks at first: the nodes of one block are linked at the same time.
        for first, block in read_blocks(self._vectors, num_rows=self._block_rows):
            index.add(block)
            self._report("linking", first + len(block), self._num_rows)
        return index

    def _reserve_graph(self, index: faiss.IndexHNSW, *, links: int) -> None:
        """A vector that has been as large as this keeps the room."""
        storage = faiss.downcast_index(index.storage)
        storage.codes.resize(self._num_rows * int(storage.code_size))
        storage.codes.resize(0)
        # A node has 2 M links in the lowest layer and M in each of its other 1 / (M - 1) layers on average.
        upper = self._num_rows * links / (links - 1)
        slots = int(2 * links * self._num_rows + 1.02 * upper + 100 * links)
        index.hnsw.neighbors.resize(slots)
        index.hnsw.neighbors.resize(0)
        for vector in (index.hnsw.offsets, index.hnsw.levels):
            length = vector.size()
            vector.resize(self._num_rows + 1)
            vector.resize(length)

    def _sample(self, max_rows: int) -> FloatArray:
        self._report("sampling", 0, 1)
        sample = sample_rows(
            self._vectors, max_rows=min(max_rows, self._sample_rows), seed=self._options.seed
        )
        self._report("sampling", 1, 1)
        return sample

    def _name_partial(self, path: Path) -> Path:
        return path.with_name(path.name + ".partial")


def _write_codes(file: BinaryIO, codes: npt.NDArray[np.uint8]) -> None:
    file.write(np.ascontiguousarray(codes).data)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """`count` threads for torch and Faiss; as before afterwards."""
    if count is None:
        yield
        return
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])


def _ignore(phase: str, done: int, total: int) -> None:
    """Nobody asked for reports."""

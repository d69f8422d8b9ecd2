"""Every kind of index, written and searched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.faiss_index import FaissIndex, write_index
from search_r1.search.kinds import SCANNED_KINDS, IndexKind, IndexOptions, SearchOptions, parse_options
from search_r1.search.ranking import compare_rows, order_hits
from search_r1.search.vector_index import open_exact, open_index, search_source
from tests.search_r1.search.vectors import FloatArray, make_queries, make_vectors, search_exactly

COUNT, DIM = 3000, 64
EVERY_KIND = pytest.mark.parametrize("kind", list(IndexKind))


@pytest.fixture(scope="module")
def vectors() -> FloatArray:
    return make_vectors(COUNT, DIM)


@pytest.fixture(scope="module")
def queries(vectors: FloatArray) -> FloatArray:
    return make_queries(vectors, 50)


@pytest.fixture(scope="module")
def built(vectors: FloatArray, tmp_path_factory: pytest.TempPathFactory) -> dict[IndexKind, Path]:
    folder = tmp_path_factory.mktemp("indexes")
    for kind in IndexKind:
        write_index(vectors, folder / kind, options=IndexOptions(kind=kind), num_threads=1)
    return {kind: folder / kind for kind in IndexKind}


@EVERY_KIND
def test_a_built_index_finds_what_exact_search_finds(
    kind: IndexKind, built: dict[IndexKind, Path], vectors: FloatArray, queries: FloatArray
) -> None:
    index = open_index(built[kind])
    assert (index.kind, index.dim, len(index)) == (kind, DIM, COUNT)
    scores, rows = index.search(queries, topk=10)
    expected = search_exactly(vectors, queries, topk=10)
    least = 1.0 if kind is IndexKind.FLAT else 0.95
    assert compare_rows(rows, expected, k=3) >= least
    assert (np.diff(scores, axis=1) <= 0).all()
    exact = np.einsum("nkd,nd->nk", vectors[rows], queries)
    assert np.abs(scores - exact).max() < (1e-6 if kind is IndexKind.FLAT else 0.01)


@EVERY_KIND
def test_a_query_finds_the_same_alone_in_a_batch_mapped_and_loaded(
    kind: IndexKind, built: dict[IndexKind, Path], queries: FloatArray
) -> None:
    index = open_index(built[kind])
    scores, rows = index.search(queries, topk=5)
    alone, alone_rows = index.search(queries[17:18], topk=5)
    assert alone_rows[0].tolist() == rows[17].tolist()
    assert np.abs(alone[0] - scores[17]).max() <= 1e-6
    loaded, loaded_rows = open_index(built[kind], mmap=False).search(queries, topk=5)
    assert (loaded_rows == rows).all()
    assert np.abs(loaded - scores).max() <= 1e-6


@pytest.mark.parametrize("kind", SCANNED_KINDS)
def test_of_many_copies_the_first_are_found(kind: IndexKind, tmp_path: Path) -> None:
    vectors = make_vectors(9000, DIM)  # more than a block
    copies = np.sort(np.random.default_rng(0).choice(9000, 200, replace=False))
    vectors[copies] = vectors[copies[0]]
    write_index(vectors, tmp_path / "index", options=IndexOptions(kind=kind), num_threads=1)
    scores, rows = open_index(tmp_path / "index").search(vectors[[copies[0], 1, copies[5]]], topk=3)
    assert rows[0].tolist() == rows[2].tolist() == copies[:3].tolist()
    assert rows[1, 0] == 1
    assert len(set(scores[0].tolist())) == 1


@EVERY_KIND
def test_more_results_than_vectors_are_padded(kind: IndexKind, tmp_path: Path) -> None:
    vectors = make_vectors(3, DIM)
    if kind is IndexKind.IVF_PQ:
        with pytest.raises(RetrieverError, match="needs at least 256 vectors, got 3; use kind flat"):
            write_index(vectors, tmp_path / "index", options=IndexOptions(kind=kind))
        return
    write_index(vectors, tmp_path / "index", options=IndexOptions(kind=kind), num_threads=1)
    index = open_index(tmp_path / "index")
    scores, rows = index.search(vectors[:2], topk=5)
    assert sorted(rows[0].tolist()) == [-1, -1, 0, 1, 2]
    assert rows[:, 0].tolist() == [0, 1]
    assert np.isneginf(scores[:, 3:]).all()
    assert index.search(vectors[:0], topk=5)[1].shape == (0, 5)


@EVERY_KIND
def test_the_same_vectors_give_the_same_file(
    kind: IndexKind, built: dict[IndexKind, Path], vectors: FloatArray, tmp_path: Path
) -> None:
    reports: list[tuple[str, int, int]] = []
    options = write_index(
        vectors,
        tmp_path / "again",
        options=IndexOptions(kind=kind),
        num_threads=1,
        report=lambda *report: reports.append(report),
    )
    assert (tmp_path / "again").read_bytes() == built[kind].read_bytes()
    assert {phase: (done, total) for phase, done, total in reports}["add vectors"] == (COUNT, COUNT)
    assert parse_options(options.factory or "").kind is kind
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_what_cannot_be_written_is_named_and_leaves_nothing(vectors: FloatArray, tmp_path: Path) -> None:
    spoilt = vectors.copy()
    spoilt[42, 3] = np.nan
    for source, name, complaint in (
        (spoilt, "flat", "vector 42 is not finite"),
        (vectors, "IVF5000,PQ32", "Faiss cannot train 'IVF5000,PQ32' on 3000 vectors"),
        (vectors, "IVF16,PQ30", "IVF16,PQ30"),
    ):
        with pytest.raises(RetrieverError, match=complaint):
            write_index(source, tmp_path / "index", options=parse_options(name), num_threads=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQ8", "IVF16,PQ32x4", "IVF16,PQ16x4,RFlat", "IVF16_HNSW8,PQ16np", "HNSW16", "HNSW16,SQ8"],
)
def test_files_that_faiss_wrote_open_too(factory: str, vectors: FloatArray, tmp_path: Path) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:400])
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "index"))
    scores, rows = open_index(tmp_path / "index").search(vectors[:5], topk=3)
    assert (scores > 0.5).all()
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_opened_says_why(built: dict[IndexKind, Path], tmp_path: Path) -> None:
    untrained = faiss.IndexScalarQuantizer(8, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    for index, complaint in (
        (faiss.IndexFlatL2(8), "metric 1, expected inner_product"),
        (faiss.IndexRefineFlat(faiss.IndexFlatIP(8)), "IndexRefineFlat, which is not searched here"),
        (untrained, "never trained"),
    ):
        faiss.write_index(index, str(tmp_path / "index"))
        with pytest.raises(RetrieverError, match=complaint):
            open_index(tmp_path / "index")
    with pytest.raises(RetrieverError, match="not a file"):
        open_index(tmp_path / "nothing")
    with pytest.raises(RetrieverError, match="exact search by torch reads flat, fp16, sq8"):
        open_index(built[IndexKind.HNSW], device="torch")
    with pytest.raises(RetrieverError, match="Faiss searches flat, ivf_pq on GPUs"):
        open_index(built[IndexKind.HNSW], device="faiss_gpu")
    with pytest.raises(RetrieverError, match="sees no GPU"):
        open_index(built[IndexKind.FLAT], device="faiss_gpu")
    (tmp_path / "text").write_text("no index at all")
    with pytest.raises(RetrieverError, match="not a readable Faiss index"):
        open_index(tmp_path / "text")


@EVERY_KIND
def test_a_truncated_or_damaged_file_is_an_error_and_no_crash(
    kind: IndexKind, built: dict[IndexKind, Path], tmp_path: Path
) -> None:
    content = built[kind].read_bytes()
    for length in (10, 60, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(RetrieverError):
            open_index(tmp_path / "cut")


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (IndexKind.IVF_PQ, r"is damaged: a search found row -?\d+ of 3000; check it with `index verify`"),
        (IndexKind.HNSW, r"not a readable Faiss index .*neighbors\[\d+\] = -?\d+ out of range"),
    ],
)
def test_rows_that_are_not_in_the_index_are_damage_and_no_crash(
    kind: IndexKind, complaint: str, built: dict[IndexKind, Path], queries: FloatArray, tmp_path: Path
) -> None:
    damaged = bytearray(built[kind].read_bytes())
    end = len(damaged) - COUNT * DIM - 1000  # of the lists or the graph; the whole vectors follow
    damaged[end - 3000 : end] = np.random.default_rng(0).bytes(3000)
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(RetrieverError, match=complaint):
        open_index(tmp_path / "damaged", search=SearchOptions(nprobe=64)).search(queries, topk=300)


@pytest.mark.parametrize("refined", [True, False])
def test_shards_as_on_several_gpus_find_the_same_rows(
    refined: bool, vectors: FloatArray, queries: FloatArray, tmp_path: Path
) -> None:
    """Shards of the CPU stand in for those of GPUs: they have no lists and no `nprobe` of their own."""
    options = parse_options("IVF64,PQ8x4,Refine(SQ8)" if refined else "IVF64,PQ8x4")
    write_index(vectors, tmp_path / "index", options=options, num_threads=1)

    def shard(lists: faiss.Index) -> faiss.Index:
        shards = faiss.IndexShards(DIM, False, False)
        for first in (0, COUNT // 2):
            part = faiss.clone_index(lists)
            part.reset()
            lists.copy_subset_to(part, faiss.InvertedLists.SUBSET_TYPE_ID_RANGE, first, first + COUNT // 2)
            shards.add_shard(part)
        return shards

    search = SearchOptions(nprobe=8)
    whole = open_index(tmp_path / "index", search=search)
    index = faiss.read_index(str(tmp_path / "index"))
    moved = FaissIndex(
        index, path=tmp_path / "index", kind=IndexKind.IVF_PQ, search=search, mmap=True, move=shard
    )
    assert moved.search(queries, topk=5)[1].tolist() == whole.search(queries, topk=5)[1].tolist()
    assert len(moved) == COUNT
    assert moved.describe() == {**whole.describe(), "device": "faiss_gpu", "mmap": int(refined)}


def test_search_options_reach_the_search(
    built: dict[IndexKind, Path], vectors: FloatArray, queries: FloatArray
) -> None:
    expected = search_exactly(vectors, queries, topk=10)
    recalls = []
    for nprobe in (1, 64):
        index = open_index(built[IndexKind.IVF_PQ], search=SearchOptions(nprobe=nprobe))
        recalls.append(compare_rows(index.search(queries, topk=10)[1], expected, k=10))
    assert index.describe()["nprobe"] == 64
    assert recalls[0] < recalls[1]
    assert open_index(built[IndexKind.HNSW], search=SearchOptions(ef_search=9)).describe()["ef_search"] == 9


def test_kinds_have_our_names_and_those_of_faiss() -> None:
    names = {"Flat": "flat", "SQfp16": "fp16", "sq8": "sq8", "IVF4096,PQ96": "ivf_pq", "hnsw32_sq8": "hnsw"}
    assert {name: str(parse_options(name).kind) for name in names} == names
    for factory in ("IVF4096_HNSW32,PQ96x4", "IVF64,PQ8,Refine(SQfp16)", "IVF64,PQ8,RFlat"):
        assert parse_options(factory.lower()).factory == factory
    assert IndexOptions(kind=IndexKind.IVF_PQ).resolve(21_000_000, 768).factory == "IVF4096,PQ192,Refine(SQ8)"
    for name in ("flot", "binary", "ivf"):
        with pytest.raises(RetrieverError, match=rf"--kind '{name}' is unknown.*flat, fp16, sq8"):
            parse_options(name)


# ---- exact search by torch, and the order of results


def test_a_hundred_thousand_vectors_give_the_rows_of_faiss_flat(tmp_path: Path) -> None:
    vectors = make_vectors(100_000, 32)
    vectors[90_000:90_010] = vectors[:10]  # equal vectors: the lower row comes first
    queries = np.concatenate([make_queries(vectors, 20), vectors[:10]])
    flat = faiss.IndexFlatIP(32)
    flat.add(vectors)
    scores, expected = flat.search(queries, 10)
    expected = np.take_along_axis(expected, np.lexsort((expected, -scores.round(6)), axis=1), axis=1)
    write_index(vectors, tmp_path / "index", options=IndexOptions())
    _, rows = open_index(tmp_path / "index").search(queries, topk=10)
    assert rows.tolist() == expected.tolist()
    _, of_source = search_source(vectors, queries[:5], topk=7)
    assert of_source.tolist() == search_exactly(vectors, queries[:5], topk=7).tolist()


def test_shards_of_float16_give_the_same_rows_as_one_piece(tmp_path: Path) -> None:
    vectors = make_vectors(2_000, 64)
    queries = make_queries(vectors, 30)
    write_index(vectors, tmp_path / "index", options=IndexOptions(kind=IndexKind.FP16))
    # Devices of torch's kind; the CPU stands in for the GPUs.
    sharded = open_exact(tmp_path / "index", mmap=True, on_gpu=True, devices=["cpu", "cpu", "cpu"])
    scores, rows = sharded.search(queries, topk=10)
    whole_scores, whole_rows = open_index(tmp_path / "index").search(queries, topk=10)
    assert (rows == whole_rows).all()
    assert (scores == whole_scores).all()


def test_hits_are_ordered_by_score_then_row_and_padded() -> None:
    scores = np.array([[0.5, 0.9, 0.5, 9.0]], dtype=np.float32)
    best, ordered = order_hits(scores, np.array([[8, 3, 2, -1]]), topk=5)
    assert ordered.tolist() == [[3, 2, 8, -1, -1]]
    assert best[0, :3].tolist() == [np.float32(0.9), 0.5, 0.5]
    assert np.isneginf(best[0, 3:]).all()
    found, expected = np.array([[1, 2, 3], [4, -1, -1]]), np.array([[3, 2, 9], [4, 5, -1]])
    assert compare_rows(found, expected, k=1) == 0.5
    assert compare_rows(found, expected, k=3) == 3 / 5


MEASURE_ANONYMOUS = """
import sys
from pathlib import Path
from threading import Event, Thread
import numpy as np
import faiss
from search_r1.search.faiss_index import FaissIndex, write_index
from search_r1.search.kinds import parse_options

class Generated:
    shape = (300_000, 256)
    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.shape[0])
        generator = np.random.default_rng(start)
        return generator.standard_normal((stop - start, self.shape[1]), dtype=np.float32)

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.wait(0.005):
        seen.append(anonymous())

done, seen, before = Event(), [], anonymous()
watcher = Thread(target=watch)
watcher.start()
write_index(Generated(), Path(sys.argv[1]), options=parse_options(sys.argv[2]), num_threads=1)
done.set()
watcher.join()
print(max(seen) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "IVF64,PQ32x4,Refine(SQfp16)"])
def test_a_build_never_holds_all_vectors(name: str, tmp_path: Path) -> None:
    """In anonymous memory: pages of mapped codes are the system's to drop."""
    child = [sys.executable, "-c", MEASURE_ANONYMOUS, str(tmp_path / "index"), name]
    done = subprocess.run(child, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    index_bytes, sample_bytes, block_bytes = 300_000 * 24, 100_000 * 256 * 4, 1 << 26
    assert int(done.stdout) < 3 * index_bytes + 2 * sample_bytes + 2 * block_bytes < 300_000 * 256 * 4 * 1.3

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from search_r1.search import building
from search_r1.search.building import BuildOptions, build_index, check_disk, take_query
from search_r1.search.dense import load_dense
from search_r1.search.encoder import TextEncoder
from search_r1.search.encoding_run import VECTORS_FILE
from search_r1.search.errors import RetrieverError
from search_r1.search.index_builder import main
from search_r1.search.kinds import IndexKind, IndexOptions
from search_r1.search.manifest import load_manifest, locate_manifest
from search_r1.search.recipes import EncoderSpec
from search_r1.search.settings import DenseOptions
from search_r1.search.vector_index import open_index
from serving.files import lock_file
from tests.search_r1.search.small_world import PASSAGES, World, save_encoder, write_corpus

WORDS = sorted({word for text in PASSAGES.values() for word in re.findall(r"\w+", text)})
SQ8 = IndexOptions(kind=IndexKind.SQ8)


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A few hundred passages that differ, and no index."""
    folder = tmp_path_factory.mktemp("varied")
    rng = np.random.default_rng(0)
    texts = {str(row): f'"{row}"\n' + " ".join(rng.choice(WORDS, size=12)) for row in range(400)}
    corpus = write_corpus(folder / "corpus.jsonl", texts)
    return World(corpus, save_encoder(folder / "encoder", seed=0), folder / "index" / "e5_Flat.index")


def build(world: World, path: Path, /, *, report: building.Report | None = None, **changes: object) -> None:
    settings = {"batch_size": 4, "devices": ("cpu",), "num_threads": 1} | changes
    spec = EncoderSpec(path=str(world.encoder), family="e5")
    options = BuildOptions(corpus_path=world.corpus, index_path=path, encoder=spec, **settings)  # type: ignore[arg-type]
    build_index(options, report=report)


def load(world: World, index: Path) -> dict[str, object]:
    """The facts of what the server takes."""
    spec = EncoderSpec(path=str(world.encoder))
    options = DenseOptions(index_path=index, corpus_path=world.corpus, encoder=spec)
    retriever = load_dense(options, encoder_device="cpu")
    assert len(retriever.search(["Alice Bolton"], topk=3)[0]) == 3
    return dict(retriever.facts())


def flags_of(world: World, out: Path) -> list[str]:
    files = ["--corpus_path", str(world.corpus), "--model_path", str(world.encoder)]
    return [*files, "--retrieval_method", "e5", "--save_dir", str(out), "--devices", "cpu"]


def test_two_builds_give_the_same_bytes_and_a_manifest_without_places(world: World, tmp_path: Path) -> None:
    index = tmp_path / "new" / world.index.name
    build(world, index)
    assert index.read_bytes() == world.index.read_bytes()
    assert locate_manifest(index).read_bytes() == locate_manifest(world.index).read_bytes()
    assert sorted(path.name for path in index.parent.iterdir()) == [index.name, locate_manifest(index).name]
    manifest = load_manifest(index)
    assert manifest is not None
    assert (manifest.kind, manifest.count, manifest.dim) == ("flat", len(PASSAGES), 32)
    assert (manifest.query_prefix, manifest.passage_prefix) == ("query: ", "passage: ")
    assert manifest.encoder == "encoder"
    assert list(manifest.files) == [index.name]
    assert str(world.corpus.parent) not in locate_manifest(index).read_text()


@pytest.mark.parametrize("kind", list(IndexKind))
def test_every_kind_is_built_measured_and_taken_by_the_server(
    varied: World, tmp_path: Path, kind: IndexKind, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    index = tmp_path / f"e5_{kind}.index"
    build(varied, index, index=IndexOptions(kind=kind))
    manifest = load_manifest(index)
    assert manifest is not None
    assert manifest.kind == kind
    assert "recall against exact search" in caplog.text
    assert load(varied, index)["index_kind"] == kind


def test_another_kind_takes_the_vectors_of_an_index(varied: World, tmp_path: Path) -> None:
    flat, direct, second = (tmp_path / name / "i.index" for name in ("flat", "direct", "second"))
    build(varied, flat, keep_vectors=tmp_path / "raw")
    build(varied, direct, index=SQ8)
    phases: set[str] = set()
    for source in (flat, tmp_path / "raw"):
        build(varied, second, index=SQ8, from_index=source, report=lambda phase, *_: phases.add(phase))
        assert second.read_bytes() == direct.read_bytes()
        assert load_manifest(second) == load_manifest(direct)
    assert "add vectors" in phases
    assert "encode passages" not in phases


def test_vectors_of_something_else_are_refused(varied: World, world: World, tmp_path: Path) -> None:
    out = tmp_path / "out.index"
    with pytest.raises(RetrieverError, match=r"of another corpus or encoder:\n  corpus\.bytes"):
        build(varied, out, from_index=world.index)
    raw = tmp_path / "raw"
    vectors = TextEncoder(EncoderSpec(path=str(varied.encoder), family="e5")).encode_passages(["Alice"] * 400)
    vectors.tofile(raw)
    with pytest.raises(RetrieverError, match=r"the vector of passage .* has cosine"):
        build(varied, out, from_index=raw)
    with pytest.raises(RetrieverError, match="nowhere is not a file"):
        build(varied, out, from_index=tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_an_index_that_fails_its_trial_is_not_published(varied: World, tmp_path: Path) -> None:
    index = tmp_path / "i.index"
    build(varied, index)
    before = index.read_bytes(), locate_manifest(index).read_bytes()

    def mix_up_vectors(phase: str, done: int, total: int) -> None:
        if phase == "encode passages" and done == total:
            path = tmp_path / "i.index.building" / VECTORS_FILE
            np.roll(np.fromfile(path, dtype=np.float32).reshape(total, -1), 1, axis=0).tofile(path)

    with pytest.raises(RetrieverError, match=r"do not find themselves.*it is not published"):
        build(varied, index, report=mix_up_vectors)
    assert (index.read_bytes(), locate_manifest(index).read_bytes()) == before


def test_a_second_builder_of_the_same_index_is_refused(world: World, tmp_path: Path) -> None:
    lock = tmp_path / "i.index.building" / "lock"
    with lock_file(lock, taken=AssertionError()), pytest.raises(RetrieverError, match="another builder"):
        build(world, tmp_path / "i.index")


def test_want_of_disk_is_named(world: World, tmp_path: Path) -> None:
    spec = EncoderSpec(path=str(world.encoder))
    options = BuildOptions(corpus_path=world.corpus, index_path=tmp_path / "i.index", encoder=spec)
    options.folder.mkdir()
    check_disk(options, count=10, dim=32, num_unencoded=10)
    with pytest.raises(RetrieverError, match=r"the build needs 1152000000\.0 GB in"):
        check_disk(options, count=3 * 10**15, dim=32, num_unencoded=3 * 10**15)


def test_bad_input_is_named_and_keeps_the_old_index(
    copied_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    before = copied_world.index.read_bytes()
    flags = flags_of(copied_world, copied_world.index.parent)
    assert main([*flags, "--kind", "flot"]) == 1
    assert "--kind 'flot' is unknown" in caplog.text
    with copied_world.corpus.open("a") as file:
        file.write(json.dumps({"id": "9", "text": "no contents"}) + "\n")
    assert main(flags) == 1
    assert f"corpus.jsonl:{len(PASSAGES) + 1}: no 'contents'" in caplog.text
    assert copied_world.index.read_bytes() == before
    assert len(list(copied_world.index.parent.iterdir())) == 2


def test_published_flags_work(world: World, tmp_path: Path) -> None:
    published = "--max_length 180 --batch_size 512 --pooling_method cls --faiss_type Flat --use_fp16"
    assert main([*flags_of(world, tmp_path), *published.split(), "--save_embedding", "--faiss_gpu"]) == 0
    manifest = load_manifest(tmp_path / "e5_Flat.index")
    assert manifest is not None
    assert (manifest.max_length, manifest.pooling) == (180, "cls")
    assert (tmp_path / "e5_Flat.index").read_bytes() != world.index.read_bytes()
    kept = tmp_path / "emb_e5.memmap"
    assert np.memmap(kept, dtype=np.float32, mode="r").reshape(-1, 32).shape == (len(PASSAGES), 32)
    again = f"--embedding_path {kept} --faiss_type SQ8 --max_length 180 --pooling_method cls"
    assert main([*flags_of(world, tmp_path), *again.split()]) == 0
    assert open_index(tmp_path / "e5_SQ8.index").kind is IndexKind.SQ8
    bm25 = ["--corpus_path", str(world.corpus), "--retrieval_method", "bm25", "--save_dir", str(tmp_path)]
    assert main(bm25) == 0
    assert (tmp_path / "bm25").is_dir()


def test_a_corpus_that_changes_under_the_build_is_refused(world: World, tmp_path: Path) -> None:
    copied = world.copy(tmp_path)

    def change(phase: str, done: int, total: int) -> None:
        if phase == "encode passages" and done == total:
            copied.corpus.write_text(copied.corpus.read_text().replace("Bolton", "Dalton"))

    index = tmp_path / "i.index"
    with pytest.raises(RetrieverError, match="was written to while it was encoded"):
        build(copied, index, report=change)
    assert not index.exists()
    with pytest.raises(RetrieverError, match=r"unfinished work of another build \(corpus_sha256"):
        build(copied, index)
    with pytest.raises(RetrieverError, match="vectors of an unfinished build"):
        build(copied, index, from_index=copied.index)
    build(copied, index, restart=True)
    with pytest.raises(RetrieverError, match="is the index to be written"):
        build(copied, index, from_index=index, index=SQ8)


def test_a_query_is_the_first_sentence_without_the_title() -> None:
    assert take_query('"Title"\nFirst one. Second one.') == "First one."
    assert take_query("Only a title") == "Only a title"

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from search_r1.search import building, defaults
from search_r1.search.dense import load_dense
from search_r1.search.encoder import TextEncoder
from search_r1.search.encoding_run import lock_folder
from search_r1.search.errors import RetrieverError
from search_r1.search.index_builder import (
    add_arguments,
    build_index,
    choose_folder,
    choose_method,
    main,
    share_devices,
)
from search_r1.search.kinds import IndexKind, IndexOptions
from search_r1.search.manifest import load_manifest, locate_manifest
from search_r1.search.vector_index import open_index
from tests.search_r1.search.small_world import PASSAGES, REPOSITORY, World, save_encoder, write_corpus

WORDS = sorted({word for text in PASSAGES.values() for word in re.findall(r"\w+", text)})


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A few hundred passages that differ, and no index."""
    folder = tmp_path_factory.mktemp("varied")
    rng = np.random.default_rng(0)
    texts = {str(row): f'"{row}"\n' + " ".join(rng.choice(WORDS, size=12)) for row in range(400)}
    corpus = write_corpus(folder / "corpus.jsonl", texts)
    return World(corpus, save_encoder(folder / "encoder", seed=0), folder / "index" / "e5_Flat.index")


def build(world: World, index: Path, **changes: object) -> None:
    settings = {"retriever_name": "e5", "batch_size": 4, "devices": ["cpu"]} | changes
    build_index(world.corpus, encoder_path=world.encoder, index_path=index, **settings)


def flags_of(world: World, out: Path) -> list[str]:
    files = ["--corpus_path", str(world.corpus), "--model_path", str(world.encoder)]
    return [*files, "--retrieval_method", "e5", "--save_dir", str(out)]


def test_two_builds_give_the_same_bytes(world: World, tmp_path: Path) -> None:
    index = tmp_path / "new" / world.index.name
    build(world, index)
    assert index.read_bytes() == world.index.read_bytes()
    assert locate_manifest(index).read_bytes() == locate_manifest(world.index).read_bytes()
    assert sorted(path.name for path in index.parent.iterdir()) == [index.name, locate_manifest(index).name]


def test_the_manifest_says_what_the_index_is_made_of_and_names_no_place(world: World) -> None:
    manifest = load_manifest(world.index)
    assert manifest is not None
    assert (manifest.kind, manifest.count, manifest.dim) == ("flat", len(PASSAGES), 32)
    assert (manifest.query_prefix, manifest.passage_prefix) == ("query: ", "passage: ")
    assert manifest.encoder == "encoder"
    assert manifest.metric == "inner_product"
    assert manifest.corpus.bytes == world.corpus.stat().st_size
    assert list(manifest.files) == [world.index.name]
    assert str(world.corpus.parent) not in locate_manifest(world.index).read_text()


@pytest.mark.parametrize("kind", list(IndexKind))
def test_every_kind_is_built_measured_and_taken_by_the_server(
    varied: World, tmp_path: Path, kind: IndexKind, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    index = tmp_path / f"e5_{kind}.index"
    build(varied, index, options=IndexOptions(kind=kind))
    manifest = load_manifest(index)
    assert manifest is not None
    assert manifest.kind == kind
    assert "recall against exact search" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*manifest.files, locate_manifest(index).name]
    )
    retriever = load_dense(index, corpus_path=varied.corpus, encoder_path=varied.encoder)
    assert retriever.facts()["index_kind"] == kind
    assert len(retriever.search(["Alice Bolton"], topk=3)[0]) == 3


def test_another_kind_takes_the_vectors_of_an_index(
    varied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat, direct, second = (tmp_path / name / "i.index" for name in ("flat", "direct", "second"))
    build(varied, flat, keep_vectors=tmp_path / "raw")
    build(varied, direct, options=IndexOptions(kind=IndexKind.SQ8))
    monkeypatch.setattr(building, "encode_here", None)
    for source in (flat, tmp_path / "raw"):
        build(varied, second, options=IndexOptions(kind=IndexKind.SQ8), from_index=source)
        assert second.read_bytes() == direct.read_bytes()
        assert load_manifest(second) == load_manifest(direct)


def test_vectors_of_something_else_are_refused(varied: World, world: World, tmp_path: Path) -> None:
    out = tmp_path / "out.index"
    with pytest.raises(RetrieverError, match=r"of another corpus or encoder:\n  corpus\.bytes"):
        build(varied, out, from_index=world.index)
    raw = tmp_path / "raw"
    vectors = TextEncoder(varied.encoder, retriever_name="e5").encode_passages(["Alice"] * 400)
    vectors.tofile(raw)
    with pytest.raises(RetrieverError, match=r"the vector of passage .* has cosine"):
        build(varied, out, from_index=raw)
    with pytest.raises(RetrieverError, match="nowhere is not a file"):
        build(varied, out, from_index=tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_an_index_that_fails_its_trial_is_not_published(
    varied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "i.index"
    build(varied, index)
    before = index.read_bytes(), locate_manifest(index).read_bytes()
    encode = TextEncoder.encode_passages

    def encode_wrongly(self: TextEncoder, passages: list[str], *, batch_size: int = 64) -> np.ndarray:
        return np.roll(encode(self, passages, batch_size=batch_size), 1, axis=0)

    monkeypatch.setattr(TextEncoder, "encode_passages", encode_wrongly)
    with pytest.raises(RetrieverError, match=r"do not find themselves.*it is not published"):
        build(varied, index, restart=True)
    assert (index.read_bytes(), locate_manifest(index).read_bytes()) == before


def test_a_manifest_never_vouches_for_files_that_are_half_replaced(
    varied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "i.index"
    build(varied, index, options=IndexOptions(kind=IndexKind.BINARY))
    replace, calls = os.replace, 0

    def fail_at_the_second(source: Path, target: Path) -> None:
        nonlocal calls
        if Path(target).parent == tmp_path:
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        build(varied, index, options=IndexOptions(kind=IndexKind.BINARY, seed=1))
    assert calls == 2
    assert not locate_manifest(index).exists()
    assert not index.exists()  # and never beside the vectors of another
    monkeypatch.undo()
    build(varied, index)
    assert sorted(path.name for path in tmp_path.iterdir()) == [index.name, locate_manifest(index).name]


def test_files_of_the_old_kind_go_with_it(varied: World, tmp_path: Path) -> None:
    index = tmp_path / "i.index"
    build(varied, index, options=IndexOptions(kind=IndexKind.BINARY))
    assert len(list(tmp_path.iterdir())) == 3
    build(varied, index)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_builder_of_the_same_index_is_refused(world: World, tmp_path: Path) -> None:
    index = tmp_path / "i.index"
    held = lock_folder(tmp_path / "i.index.building")
    with pytest.raises(RetrieverError, match="another builder"):
        build(world, index)
    os.close(held)
    build(world, index)


def test_want_of_disk_is_named_before_anything_is_encoded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "encode_here", None)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**8))
    with pytest.raises(RetrieverError, match=r"the build needs .* GB in"):
        build(world, tmp_path / "i.index")


def test_the_builder_names_a_malformed_line_and_keeps_the_old_index(
    copied_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    before = copied_world.index.read_bytes()
    with copied_world.corpus.open("a") as file:
        file.write(json.dumps({"id": "9", "text": "no contents"}) + "\n")
    assert main(flags_of(copied_world, copied_world.index.parent)) == 1
    assert f"corpus.jsonl:{len(PASSAGES) + 1}: no 'contents'" in caplog.text
    assert copied_world.index.read_bytes() == before
    assert locate_manifest(copied_world.index).exists()
    assert len(list(copied_world.index.parent.iterdir())) == 2


def test_published_flags_work(world: World, tmp_path: Path) -> None:
    published = "--max_length 180 --batch_size 512 --pooling_method mean --faiss_type Flat --use_fp16"
    assert main([*flags_of(world, tmp_path), *published.split(), "--save_embedding", "--faiss_gpu"]) == 0
    assert len(open_index(tmp_path / "e5_Flat.index")) == len(PASSAGES)
    manifest = load_manifest(tmp_path / "e5_Flat.index")
    assert manifest is not None
    assert manifest.max_length == 180
    kept = np.memmap(tmp_path / "emb_e5.memmap", dtype=np.float32, mode="r").reshape(-1, manifest.dim)
    assert kept.shape == (len(PASSAGES), 32)
    again = [
        "--embedding_path",
        str(tmp_path / "emb_e5.memmap"),
        "--faiss_type",
        "SQ8",
        "--max_length",
        "180",
    ]
    assert main([*flags_of(world, tmp_path), *again]) == 0
    assert open_index(tmp_path / "e5_SQ8.index").kind is IndexKind.SQ8


def test_pooling_and_length_change_the_vectors(world: World, tmp_path: Path) -> None:
    assert main([*flags_of(world, tmp_path), "--pooling_method", "cls"]) == 0
    assert (tmp_path / "e5_Flat.index").read_bytes() != world.index.read_bytes()
    retriever = load_dense(tmp_path / "e5_Flat.index", corpus_path=world.corpus, encoder_path=world.encoder)
    assert retriever.facts()["pooling"] == "cls"


@pytest.mark.parametrize("flags", [["--kind", "flot"], ["--kind", "sq8", "--num_lists", "4"]])
def test_a_kind_that_cannot_be_built_is_named(
    world: World, tmp_path: Path, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*flags_of(world, tmp_path), *flags]) == 1
    assert "flot" in caplog.text or "num_lists" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_words_are_indexed_by_the_same_command(world: World, tmp_path: Path) -> None:
    command = ["--corpus_path", str(world.corpus), "--retrieval_method", "bm25", "--save_dir", str(tmp_path)]
    assert main(command) == 0
    assert (tmp_path / "bm25").is_dir()


def test_devices_are_shared_by_processes() -> None:
    assert share_devices(["cuda:0", "cuda:1"], num_processes=None) == ("cuda:0", "cuda:1")
    assert share_devices(["cuda:0", "cuda:1"], num_processes=3) == ("cuda:0", "cuda:1", "cuda:0")
    assert share_devices(["cpu"], num_processes=2) == ("cpu", "cpu")


def test_the_worlds_encoder_is_of_family_e5() -> None:
    assert choose_method(None, model_path=str(REPOSITORY / "world" / "models" / "encoder")) == "e5"
    assert choose_method(None, model_path="BAAI/bge-base-en-v1.5") is None
    assert choose_method("gte", model_path="x") == "gte"


def test_only_the_embedded_world_is_built_into_its_folder(world: World) -> None:
    def choose(*flags: str) -> Path:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return choose_folder(parser.parse_args(flags))

    assert choose() == defaults.INDEX_DIR
    assert choose("--corpus_path", str(world.corpus)) == Path("index")
    assert choose("--model_path", str(world.encoder)) == Path("index")
    assert choose("--save_dir", "x") == Path("x")


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
    build(copied, index, restart=True)
    assert index.exists()


def test_encoded_work_is_not_thrown_away_for_a_build_from_other_vectors(
    varied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat, index = tmp_path / "flat" / "i.index", tmp_path / "out" / "i.index"
    build(varied, flat)
    with monkeypatch.context() as broken:
        broken.setattr(building, "write_index", None)
        with pytest.raises(TypeError):
            build(varied, index)
    with pytest.raises(RetrieverError, match="vectors of an unfinished build"):
        build(varied, index, from_index=flat)
    assert (index.with_name("i.index.building") / "vectors.f32").exists()
    build(varied, index, from_index=flat, restart=True)
    assert index.read_bytes() == flat.read_bytes()
    with pytest.raises(RetrieverError, match="is the index to be written"):
        build(varied, index, from_index=index, options=IndexOptions(kind=IndexKind.SQ8))


MEASURED_BUILD = """
import sys
import numpy as np
from search_r1.search.corpus import open_corpus, sample_rows
from search_r1.search.encoder import TextEncoder
from search_r1.search.index_builder import main
from pathlib import Path

corpus_path, encoder_path, vectors_path, index_path, kind = sys.argv[1:]
corpus = open_corpus(Path(corpus_path))
rows = sample_rows(len(corpus), size=10)  # the known passages; the other vectors are drawn
vectors = np.memmap(vectors_path, dtype=np.float32, mode="r+").reshape(len(corpus), -1)
known = TextEncoder(encoder_path, retriever_name="e5").encode_passages([corpus[row].contents for row in rows])
vectors[rows] = known
vectors.flush()
del vectors
flags = ["--corpus_path", corpus_path, "--model_path", encoder_path, "--retrieval_method", "e5"]
flags += ["--from_index", vectors_path, "--index_path", index_path, "--num_threads", "1", "--kind", kind]
assert main(flags) == 0
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_build_takes_no_more_memory_than_the_index_and_a_gibibyte(tmp_path: Path) -> None:
    kind, count, dim = IndexKind.SQ8, 800_000, 256
    save_encoder(tmp_path / "encoder", seed=0, dim=dim)
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for row in range(count):
            file.write(f'{{"id": "{row}", "contents": "{WORDS[row % len(WORDS)]} {row}"}}\n')
    rng = np.random.default_rng(0)
    with (tmp_path / "vectors").open("wb") as raw:
        for _ in range(count // 10_000):
            block = rng.normal(size=(10_000, dim)).astype(np.float32)
            raw.write((block / np.linalg.norm(block, axis=1, keepdims=True)).tobytes())
    index = tmp_path / "i.index"
    files = [str(tmp_path / name) for name in ("corpus.jsonl", "encoder", "vectors", "i.index")]
    command = [sys.executable, "-c", MEASURED_BUILD, *files, kind]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    peak, size = int(ended.stdout.split()[-1]) * 1024, index.stat().st_size
    print(f"{kind}: index of {size / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")  # noqa: T201
    assert load_manifest(index) is not None
    assert peak <= size + 2**30

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from search_r1.search import defaults
from search_r1.search.dense import DenseRetriever, VectorIndex, load_dense
from search_r1.search.encoder import TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.index_builder import build_index, main
from search_r1.search.manifest import locate_manifest
from tests.search_r1.search.small_world import PASSAGES, World, save_encoder, write_corpus

QUERIES = ["Alice Marsh born", "film Silver Harbour", "größe 漢字 🎬", "river", "unknown words only"]


def load(world: World) -> DenseRetriever:
    return load_dense(
        world.index, corpus_path=world.corpus, encoder_path=str(world.encoder), retriever_name="e5"
    )


@pytest.fixture
def copied_world(world: World, tmp_path: Path) -> World:
    """A world that a test may spoil."""
    shutil.copytree(world.index.parent, tmp_path / "index")
    shutil.copy(world.corpus, tmp_path / "corpus.jsonl")
    shutil.copytree(world.encoder, tmp_path / "encoder")
    return World(tmp_path / "corpus.jsonl", tmp_path / "encoder", tmp_path / "index" / world.index.name)


def test_finds_what_brute_force_finds(world: World) -> None:
    encoder = TextEncoder(world.encoder, retriever_name="e5", device="cpu")
    passages = encoder.encode_passages(list(PASSAGES.values()))
    queries = encoder.encode_queries(QUERIES)
    np.testing.assert_allclose(np.linalg.norm(passages, axis=1), 1.0, atol=1e-6)
    scores = queries @ passages.T
    for query_scores, hits in zip(scores, load(world).search(QUERIES, topk=3), strict=True):
        best = np.argsort(-query_scores)[:3]
        assert [hit.document.id for hit in hits] == [list(PASSAGES)[row] for row in best]
        np.testing.assert_allclose([hit.score for hit in hits], query_scores[best], atol=1e-5)


def test_a_text_has_the_same_vector_alone_and_in_any_batch(world: World) -> None:
    encoder = TextEncoder(world.encoder, retriever_name="e5", device="cpu")
    together = encoder.encode_queries(QUERIES, batch_size=2)
    alone = np.concatenate([encoder.encode_queries([query]) for query in QUERIES])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_queries_and_passages_have_their_own_prefix(world: World) -> None:
    encoder = TextEncoder(world.encoder, retriever_name="e5", device="cpu")
    as_query = encoder.encode_queries(["passage: Bolton"])
    assert not np.allclose(as_query, encoder.encode_passages(["Bolton"]), atol=1e-3)


def test_a_long_text_is_cut_not_refused(world: World) -> None:
    assert len(load(world).search(["Bolton " * 5000], topk=1)[0]) == 1


def test_edges_of_a_search(world: World) -> None:
    retriever = load(world)
    assert retriever.search([], topk=3) == []
    assert retriever.search([" ", "\n"], topk=3) == [[], []]
    assert len(retriever.search(["Bolton"], topk=100)[0]) == len(PASSAGES) == len(retriever)


def test_two_builds_give_the_same_bytes(world: World, tmp_path: Path) -> None:
    index = tmp_path / "new" / world.index.name
    build_index(world.corpus, encoder_path=world.encoder, index_path=index, batch_size=4)
    assert index.read_bytes() == world.index.read_bytes()
    assert locate_manifest(index).read_bytes() == locate_manifest(world.index).read_bytes()
    assert sorted(path.name for path in index.parent.iterdir()) == [index.name, locate_manifest(index).name]


def spoil_corpus(world: World) -> None:
    world.corpus.write_text(world.corpus.read_text().replace("Bolton", "Dalton"))


def shorten_corpus(world: World) -> None:
    write_corpus(world.corpus, dict(list(PASSAGES.items())[:-1]))


def change_encoder(world: World) -> None:
    shutil.rmtree(world.encoder)
    save_encoder(world.encoder, seed=1)


def shrink_encoder(world: World) -> None:
    shutil.rmtree(world.encoder)
    save_encoder(world.encoder, seed=0, dim=16)


def change_prefix(world: World) -> None:
    path = locate_manifest(world.index)
    path.write_text(path.read_text().replace('"query: "', '"question: "'))


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (spoil_corpus, "corpus_sha256"),
        (shorten_corpus, "count"),
        (change_encoder, "encoder_sha256"),
        (shrink_encoder, "dim"),
        (change_prefix, "query_prefix"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    copied_world: World, spoil: Callable[[World], None], field: str
) -> None:
    spoil(copied_world)
    with pytest.raises(RetrieverError, match=f"  {field}: ") as caught:
        load(copied_world)
    assert "python -m search_r1.search.index_builder" in str(caught.value)


def test_without_a_manifest_a_fitting_index_loads_with_a_warning(
    copied_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    locate_manifest(copied_world.index).unlink()
    load(copied_world)
    assert "no manifest" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (shorten_corpus, "count: "),
        (shrink_encoder, "dim: "),
        (change_encoder, "known passages do not find themselves"),
    ],
)
def test_without_a_manifest_a_wrong_index_is_refused_all_the_same(
    copied_world: World, spoil: Callable[[World], None], complaint: str
) -> None:
    locate_manifest(copied_world.index).unlink()
    spoil(copied_world)
    with pytest.raises(RetrieverError, match=complaint):
        load(copied_world)


@pytest.mark.parametrize("text", ["no json", "[]", '{"dim": 3}'])
def test_a_broken_manifest_is_named(copied_world: World, text: str) -> None:
    locate_manifest(copied_world.index).write_text(text)
    with pytest.raises(RetrieverError, match=r"manifest\.json"):
        load(copied_world)


def test_without_a_manifest_a_malformed_line_is_met_at_the_start(copied_world: World) -> None:
    locate_manifest(copied_world.index).unlink()
    lines = copied_world.corpus.read_text().splitlines(keepends=True)
    copied_world.corpus.write_text("".join([*lines[:4], '{"id": "4", "text": "no contents"}\n', *lines[5:]]))
    with pytest.raises(RetrieverError, match=r"corpus\.jsonl:5: no 'contents'"):
        load(copied_world)


def test_a_damaged_index_is_refused(copied_world: World) -> None:
    damaged = bytearray(copied_world.index.read_bytes())
    damaged[-2] ^= 0x40  # one bit of the last vector: Faiss reads it without a complaint
    copied_world.index.write_bytes(damaged)
    VectorIndex.load(copied_world.index, on_gpu=False)
    with pytest.raises(RetrieverError, match=r"e5_Flat\.index is damaged or not the one") as caught:
        load(copied_world)
    assert "python -m search_r1.search.index_builder" in str(caught.value)


def test_a_broken_or_missing_index_is_named(copied_world: World) -> None:
    copied_world.index.write_bytes(b"not an index")
    with pytest.raises(RetrieverError, match="is damaged"):
        load(copied_world)
    locate_manifest(copied_world.index).unlink()
    with pytest.raises(RetrieverError, match=r"e5_Flat\.index is not a readable Faiss index"):
        load(copied_world)
    copied_world.index.unlink()
    with pytest.raises(RetrieverError, match=r"e5_Flat\.index is not a file"):
        load(copied_world)


def test_a_wrong_encoder_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match=r"encoder .*nowhere does not load"):
        TextEncoder(tmp_path / "nowhere", retriever_name="e5")
    with pytest.raises(RetrieverError, match=r"'bm25' is unknown; known are \['arctic'"):
        TextEncoder(world.encoder, retriever_name="bm25")


def test_an_encoder_without_some_weights_is_refused(copied_world: World) -> None:
    path = copied_world.encoder / "model.safetensors"
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if not key.startswith("pooler.")}, path)
    TextEncoder(copied_world.encoder, retriever_name="e5")
    save_file({key: value for key, value in weights.items() if "LayerNorm" not in key}, path)
    with pytest.raises(RetrieverError, match="lacks the weights"):
        TextEncoder(copied_world.encoder, retriever_name="e5")


def test_the_builder_names_a_malformed_line_and_keeps_the_old_index(
    copied_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    before = copied_world.index.read_bytes()
    with copied_world.corpus.open("a") as file:
        file.write(json.dumps({"id": "9", "text": "no contents"}) + "\n")
    flags = ["--corpus_path", str(copied_world.corpus), "--model_path", str(copied_world.encoder)]
    assert main([*flags, "--save_dir", str(copied_world.index.parent), "--retrieval_method", "e5"]) == 1
    assert f"corpus.jsonl:{len(PASSAGES) + 1}: no 'contents'" in caplog.text
    assert copied_world.index.read_bytes() == before
    assert locate_manifest(copied_world.index).exists()


def test_published_builder_flags_work(copied_world: World, tmp_path: Path) -> None:
    flags = [
        "--retrieval_method",
        "e5",
        "--max_length",
        "256",
        "--batch_size",
        "512",
        "--pooling_method",
        "mean",
        "--faiss_type",
        "Flat",
    ]
    files = ["--corpus_path", str(copied_world.corpus), "--model_path", str(copied_world.encoder)]
    assert main([*flags, *files, "--use_fp16", "--save_dir", str(tmp_path / "out")]) == 0
    assert len(VectorIndex.load(tmp_path / "out" / "e5_Flat.index", on_gpu=False)) == len(PASSAGES)


def test_a_faiss_without_gpu_says_so(world: World) -> None:
    with pytest.raises(RetrieverError, match="sees no GPU"):
        VectorIndex.load(world.index, on_gpu=True)


def test_the_shipped_index_belongs_to_the_shipped_world() -> None:
    retriever = load_dense(
        defaults.INDEX_PATH,
        corpus_path=defaults.CORPUS_PATH,
        encoder_path=str(defaults.ENCODER_PATH),
        retriever_name=defaults.RETRIEVER_NAME,
    )
    assert len(retriever) >= 2000

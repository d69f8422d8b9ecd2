from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest

from search_r1.search.dense import DenseRetriever, load_dense
from search_r1.search.encoder import TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.manifest import locate_manifest
from search_r1.search.recipes import EncoderSpec, PartialRecipe
from search_r1.search.settings import DenseOptions
from tests.search_r1.search.small_world import PASSAGES, World, save_encoder, write_corpus

QUERIES = ["Alice Marsh born", "film Silver Harbour", "größe 漢字 🎬", "river", "unknown words only"]


def load(world: World, **changes: object) -> DenseRetriever:
    """`changes` are flags of the recipe, or the family."""
    family = changes.pop("family", "e5")
    spec = EncoderSpec(path=str(world.encoder), family=family, flags=PartialRecipe(**changes))  # type: ignore[arg-type]
    options = DenseOptions(index_path=world.index, corpus_path=world.corpus, encoder=spec)
    return load_dense(options, encoder_device="cpu")


def test_finds_what_brute_force_finds(world: World) -> None:
    encoder = TextEncoder(EncoderSpec(path=str(world.encoder), family="e5"), device="cpu")
    passages = encoder.encode_passages(list(PASSAGES.values()))
    queries = encoder.encode_queries(QUERIES)
    scores = queries @ passages.T
    for query_scores, hits in zip(scores, load(world).search(QUERIES, topk=3), strict=True):
        best = np.argsort(-query_scores)[:3]
        assert [hit.document.id for hit in hits] == [list(PASSAGES)[row] for row in best]
        np.testing.assert_allclose([hit.score for hit in hits], query_scores[best], atol=1e-5)


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


def change_kind(world: World) -> None:
    path = locate_manifest(world.index)
    path.write_text(path.read_text().replace('"flat"', '"sq8"'))


@pytest.mark.parametrize(
    ("spoil", "field", "values"),
    [
        (spoil_corpus, "corpus.fingerprint", []),
        (shorten_corpus, "count", ["6", "5", "--corpus_path"]),
        (shorten_corpus, "corpus.bytes", []),
        (change_encoder, "encoder_sha256", ["--retriever_model"]),
        (shrink_encoder, "dim", ["32", "16"]),
        (change_prefix, "query_prefix", ["'question: '", "'query: '", "--retriever_name e5"]),
        (change_kind, "kind", ["'sq8'", "'flat'"]),
    ],
)
def test_what_does_not_belong_together_is_refused(
    copied_world: World, spoil: Callable[[World], None], field: str, values: list[str]
) -> None:
    spoil(copied_world)
    with pytest.raises(RetrieverError, match=f"  {field}: ") as caught:
        load(copied_world)
    (line,) = (line for line in str(caught.value).splitlines() if line.startswith(f"  {field}: "))
    for value in values:
        assert value in line
    assert "index build --retrieval_method e5" in str(caught.value)


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


def test_a_damaged_index_is_refused(copied_world: World) -> None:
    damaged = bytearray(copied_world.index.read_bytes())
    damaged[-2] ^= 0x40  # one bit of the last vector: Faiss reads it without a complaint
    copied_world.index.write_bytes(damaged)
    with pytest.raises(RetrieverError, match=r"e5_Flat\.index is damaged or not the one") as caught:
        load(copied_world)
    assert "fingerprint: index was built with" in str(caught.value)
    assert "index build --retrieval_method e5" in str(caught.value)

"""Every name of a retriever opens through the settings of the server."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from search_r1.search.assemble import check_files, open_retriever
from search_r1.search.bm25 import build_bm25
from search_r1.search.errors import RetrieverError
from search_r1.search.retriever import Retriever
from search_r1.search.settings import resolve_server
from tests.search_r1.search.small_world import PASSAGES, World, save_encoder
from tests.search_r1.search.tiny_models import save_cross_encoder

NO_KEYS: Mapping[str, str] = {}


@pytest.fixture(scope="module")
def bm25(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bm25") / "index"
    build_bm25(world.corpus, index_path=folder)
    return folder


async def opened(*flags: str, environ: Mapping[str, str] = NO_KEYS) -> Retriever:
    return await open_retriever(resolve_server(flags, environ=environ)[1])


async def best(retriever: Retriever, query: str) -> str:
    (found,) = await retriever.search([query], topk=3, timeout_s=30)
    assert isinstance(found, tuple)
    await retriever.aclose()
    return found[0].document.id


async def test_a_dense_index_by_its_manifest_or_by_name(world: World) -> None:
    for name in ((), ("--retriever_name", "e5")):
        retriever = await opened(*world.flags, *name, "--no_mmap")
        assert retriever.num_passages == len(PASSAGES)
        assert retriever.describe()["query_prefix"] == "query: "
        assert await best(retriever, PASSAGES["2"]) == "2"


async def test_bm25_and_hybrid(world: World, bm25: Path) -> None:
    corpus = ["--corpus_path", str(world.corpus)]
    lexical = await opened("--retriever_name", "bm25", "--index_path", str(bm25), *corpus)
    assert lexical.describe()["retriever"] == "bm25"
    assert await best(lexical, "a river in Scotland") == "4"
    flags = [*world.flags, "--bm25_index_path", str(bm25), "--hybrid_depth", "4"]
    hybrid = await opened("--retriever_name", "hybrid", *flags)
    facts = hybrid.describe()
    assert (facts["retriever"], facts["depth"], facts["1.retriever"]) == ("hybrid", 4, "bm25")
    assert await best(hybrid, PASSAGES["2"]) == "2"


async def test_a_reranker_over_any_of_them(world: World, bm25: Path, tmp_path: Path) -> None:
    model = save_cross_encoder(tmp_path / "reranker")
    flags = ["--retriever_name", "bm25", "--index_path", str(bm25), "--corpus_path", str(world.corpus)]
    retriever = await opened(*flags, "--reranker_model", str(model), "--rerank_depth", "4")
    assert retriever.describe()["rerank_depth"] == 4
    assert await best(retriever, "a river in Scotland") in PASSAGES


async def test_a_mock_that_was_not_meant_is_named(world: World, caplog: pytest.LogCaptureFixture) -> None:
    retriever = await opened(*world.flags, environ={"IGPO_MOCK_SEARCH": "true"})
    assert await best(retriever, PASSAGES["2"]) == "2"
    assert "mock search is for online engines only" in caplog.text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--index_path", "/nowhere"], "--index_path /nowhere is not a file"),
        (["--corpus_path", "/nowhere"], "--corpus_path /nowhere is not a file"),
        (["--retriever_model", "/nowhere"], "--retriever_model /nowhere is not a folder"),
        (["--reranker_model", "/nowhere"], "--reranker_model /nowhere is not a folder"),
        (["--retriever_name", "bm25", "--index_path", "/nowhere"], "--index_path /nowhere is not a folder"),
        (
            ["--retriever_name", "hybrid", "--bm25_index_path", "/nowhere"],
            "--bm25_index_path /nowhere is not a folder",
        ),
    ],
)
def test_what_is_missing_is_named_before_anything_loads(world: World, flags: list[str], named: str) -> None:
    with pytest.raises(RetrieverError, match=named):
        check_files(resolve_server([*world.flags, *flags], environ={})[1])


async def test_what_was_opened_is_closed_when_the_rest_fails(world: World, tmp_path: Path) -> None:
    (tmp_path / "no-index").mkdir()
    before = {thread.name for thread in threading.enumerate()}
    for flags in (
        ("--retriever_name", "hybrid", "--bm25_index_path", str(tmp_path / "no-index")),
        ("--reranker_model", str(tmp_path / "no-index")),
    ):
        with pytest.raises(RetrieverError):
            await opened(*world.flags, *flags)
    left = {thread.name for thread in threading.enumerate()} - before
    assert [name for name in left if name.startswith(("search", "rerank"))] == []


async def test_an_index_without_a_manifest_asks_how_its_encoder_wants_texts(
    world: World, tmp_path: Path
) -> None:
    """As published ones are: the family is named, or what it stands for."""
    index = tmp_path / "published.index"
    index.write_bytes(world.index.read_bytes())
    encoder = save_encoder(tmp_path / "unknown", seed=0)
    flags = [
        "--index_path",
        str(index),
        "--corpus_path",
        str(world.corpus),
        "--retriever_model",
        str(encoder),
    ]
    with pytest.raises(RetrieverError, match=r"--retriever_name.*--pooling_method, --query_prefix"):
        await opened(*flags)
    told = ["--pooling_method", "mean", "--query_prefix", "query: ", "--passage_prefix", "passage: "]
    for ways in (["--retriever_name", "e5"], [*told, "--max_length", "256"]):
        assert await best(await opened(*flags, *ways), PASSAGES["2"]) == "2"


async def test_what_is_told_must_fit_the_manifest(world: World) -> None:
    assert json.loads(world.index.with_name(world.index.name + ".manifest.json").read_text())
    with pytest.raises(RetrieverError, match="query_prefix"):
        await opened(*world.flags, "--query_prefix", "")

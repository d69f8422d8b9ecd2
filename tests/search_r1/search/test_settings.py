from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from search_r1.search import defaults, settings
from search_r1.search.errors import RetrieverError
from search_r1.search.settings import (
    ONLINE_SETTINGS,
    RETRIEVER_SETTINGS,
    SERVER_SETTINGS,
    RetrieverSettings,
    add_retriever_arguments,
    resolve_server,
)
from tests.settings_table import settings_table

README = Path(settings.__file__).with_name("README.md")


def resolve(*arguments: str, **environ: str) -> RetrieverSettings:
    return resolve_server(arguments, environ=environ)[1]


def test_without_flags_the_embedded_world_is_served_to_this_machine_only() -> None:
    server, retriever = resolve_server(environ={})
    assert (server.host, server.port, server.topk, server.token) == ("127.0.0.1", 8000, 3, "")
    assert not server.no_batching
    assert retriever.dense.index_path == defaults.INDEX_PATH
    assert retriever.dense.corpus_path == defaults.CORPUS_PATH
    assert retriever.dense.encoder.path == str(defaults.ENCODER_PATH)
    assert (retriever.name, retriever.dense.device, retriever.dense.mmap) == ("", "cpu", True)


def test_the_published_flags_mean_what_they_meant() -> None:
    given = "--index_path i --corpus_path c --topk 5 --retriever_name e5 --retriever_model m --faiss_gpu"
    server, retriever = resolve_server(given.split(), environ={})
    assert (retriever.dense.index_path, retriever.dense.corpus_path) == (Path("i"), Path("c"))
    encoder = retriever.dense.encoder
    assert (encoder.family, encoder.path) == ("e5", "m")
    assert (server.topk, retriever.dense.device) == (5, "faiss_gpu")


def test_a_flag_wins_over_its_variable() -> None:
    environ = {"INDEX_PATH": "i", "TOPK": "7", "RETRIEVER_PORT": "9", "RETRIEVER_NO_BATCHING": "true"}
    server, retriever = resolve_server(["--index_path", "j"], environ=environ)
    assert (retriever.dense.index_path, server.topk, server.port, server.no_batching) == (
        Path("j"),
        7,
        9,
        True,
    )


def test_a_home_in_paths_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    retriever = resolve("--corpus_path=~/c", "--reranker_model=~/r", INDEX_PATH="~/i", RETRIEVER_MODEL="~/m")
    assert (retriever.dense.corpus_path, retriever.dense.index_path) == (
        Path("/home/me/c"),
        Path("/home/me/i"),
    )
    assert (retriever.dense.encoder.path, retriever.reranker_model) == ("/home/me/m", "/home/me/r")


def test_bm25_takes_the_published_flag_for_its_folder() -> None:
    for name in ("bm25", "BM25"):
        assert resolve("--retriever_name", name).bm25_path == defaults.INDEX_DIR / "bm25"
        assert resolve("--retriever_name", name, "--index_path", "words").bm25_path == Path("words")
    hybrid = resolve("--retriever_name", "hybrid", "--bm25_index_path", "words")
    assert (hybrid.dense.index_path, hybrid.bm25_path) == (defaults.INDEX_PATH, Path("words"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topk", "0"], r"--topk is '0', expected a whole number from 1 to 1000"),
        (["--index_device", "tpu"], r"--index_device is 'tpu', expected one of cpu, faiss_gpu, torch"),
        (["--faiss_gpu", "--index_device", "torch"], r"--faiss_gpu and --index_device torch exclude"),
        (["--rerank_depth", "many"], r"--rerank_depth is 'many'"),
        (["--token_file", "/no/such/file"], r"--token_file is '/no/such/file', which cannot be read"),
        (["--online_mode", "replay"], r"--online_cache"),
    ],
)
def test_a_bad_value_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(RetrieverError, match=message):
        resolve_server(arguments, environ={})


def test_the_token_is_never_shown() -> None:
    server, _ = resolve_server(environ={"RETRIEVER_TOKEN": "s3cret"})
    assert server.token == "s3cret"
    assert "s3cret" not in repr(server)


def test_readme_has_the_tables_and_every_flag() -> None:
    readme = README.read_text()
    assert settings_table(RETRIEVER_SETTINGS) in readme
    assert settings_table(ONLINE_SETTINGS) in readme
    assert settings_table(SERVER_SETTINGS) in readme
    parser = argparse.ArgumentParser()
    add_retriever_arguments(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    assert len(flags) > 20
    assert [flag for flag in flags if f"`{flag}`" not in readme and flag not in ("-h", "--help")] == []

"""Files that are changed in place under a running retriever: named, refused, and survived."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from pyarrow import feather
from pyarrow import json as arrow_json

from search_r1.search.bm25 import build_bm25, load_bm25
from search_r1.search.corpus import open_corpus
from search_r1.search.dense import load_dense
from search_r1.search.errors import ChangedFileError
from search_r1.search.settings import resolve_server
from tests.processes import free_port
from tests.search_r1.search.small_world import SERVER, RunningServer, World, wait_until_ready


def truncate(path: Path) -> None:
    os.truncate(path, 0)  # every mapped page of it kills who looks at it


def rewrite(path: Path) -> None:
    """The same number of bytes."""
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    path.write_bytes(path.read_bytes()[::-1])


def replace(path: Path) -> None:
    (other := path.with_name("other")).write_bytes(b"other content")
    other.replace(path)


def open_jsonl(world: World) -> tuple[Path, Callable[[], object]]:
    corpus = open_corpus(world.corpus)
    return world.corpus, lambda: corpus[0]


def open_arrow(world: World) -> tuple[Path, Callable[[], object]]:
    path = world.corpus.with_suffix(".arrow")
    feather.write_feather(arrow_json.read_json(world.corpus), str(path), compression="uncompressed")
    corpus = open_corpus(path)
    return path, lambda: corpus[0]


def open_dense(world: World) -> tuple[Path, Callable[[], object]]:
    retriever = load_dense(resolve_server(world.flags, environ={})[1].dense)
    return world.index, lambda: retriever.search(["river"], topk=3)


def open_terms(world: World) -> tuple[Path, Callable[[], object]]:
    folder = world.index.parent / "bm25"
    manifest = build_bm25(world.corpus, index_path=folder)
    retriever = load_bm25(folder, corpus_path=world.corpus)
    path = next(folder / manifest.folder / name for name in manifest.files if name.endswith(".term"))
    return path, lambda: retriever.search(["river"], topk=3)


OPENERS = [open_jsonl, open_arrow, open_dense, open_terms]


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("change", [truncate, rewrite, replace])
def test_a_file_that_was_changed_in_place_is_named(
    copied_world: World,
    opener: Callable[[World], tuple[Path, Callable[[], object]]],
    change: Callable[[Path], None],
) -> None:
    path, look = opener(copied_world)
    before = look()
    change(path)
    if change is replace:
        assert look() == before
        return
    with pytest.raises(ChangedFileError, match=rf"{path.name} .*since it was opened"):
        look()


@pytest.mark.slow
def test_a_server_whose_corpus_was_changed_says_so_and_lives(
    copied_world: World, start_server: Callable[..., RunningServer]
) -> None:
    port = free_port()
    command = [sys.executable, str(SERVER), *copied_world.flags, "--port", str(port)]
    server = start_server(command, port=port)
    wait_until_ready(server)
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        assert client.post("/retrieve", json={"query": "river"}).status_code == 200
        truncate(copied_world.corpus)
        refused = client.post("/retrieve", json={"query": "ships"})
        assert refused.status_code == 503
        assert "corpus.jsonl" in refused.json()["detail"]
        assert client.get("/readyz").status_code == 503
        assert client.get("/health").json()["status"] == "unusable"
        assert client.get("/livez").status_code == 200
    assert "since it was opened" in server.log.read_text()

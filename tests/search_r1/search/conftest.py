"""The tiny world and its running server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search_r1.search.building import BuildOptions, build_index
from search_r1.search.recipes import EncoderSpec
from tests.processes import free_port
from tests.search_r1.search.small_world import (
    PASSAGES,
    REPOSITORY,
    SERVER,
    RunningServer,
    World,
    save_encoder,
    wait_until_ready,
    write_corpus,
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    corpus = write_corpus(folder / "corpus.jsonl", PASSAGES)
    encoder = save_encoder(folder / "encoder", seed=0)
    index = folder / "index" / "e5_Flat.index"
    spec = EncoderSpec(path=str(encoder), family="e5")
    build_index(BuildOptions(corpus_path=corpus, index_path=index, encoder=spec, batch_size=4))
    return World(corpus, encoder, index)


@pytest.fixture
def copied_world(world: World, tmp_path: Path) -> World:
    """A world that a test may spoil."""
    return world.copy(tmp_path)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningServer]]:
    """Start `command` plus a port; stops what is left at the end of the session."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], *, port: int, cwd: Path = REPOSITORY) -> RunningServer:
        log = tmp_path_factory.mktemp("server") / "log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT, text=True, env=environment
            )
        started.append(process)
        return RunningServer(f"http://127.0.0.1:{port}", process, log)

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(world: World, start_server: Callable[..., RunningServer]) -> RunningServer:
    """The real server as users start it, on the small world."""
    port = free_port()
    running = start_server([sys.executable, str(SERVER), *world.flags, "--port", str(port)], port=port)
    wait_until_ready(running)
    return running

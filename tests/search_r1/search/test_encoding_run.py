from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from search_r1.search.building import BuildOptions, build_index
from search_r1.search.corpus import open_corpus
from search_r1.search.encoder import TextEncoder
from search_r1.search.encoding_run import (
    EncodingJob,
    EncodingRun,
    VectorFile,
    encode_here,
    encode_in_processes,
)
from search_r1.search.errors import RetrieverError
from search_r1.search.faiss_index import StoredVectors
from search_r1.search.recipes import EncoderSpec
from tests.search_r1.search.small_world import PASSAGES, REPOSITORY, World, save_encoder, write_corpus

DIM = 4
FACTS = {"encoder_sha256": "e", "corpus_fingerprint": "c"}


class CountingEncoder:
    """The vector of a passage is its number."""

    def __init__(self, *, stop_after: int = 1000) -> None:
        self.encoded: list[str] = []
        self._stop_after = stop_after

    def encode_passages(self, passages: Sequence[str], *, batch_size: int) -> np.ndarray:
        if len(self.encoded) + len(passages) > self._stop_after:
            raise KeyboardInterrupt
        self.encoded += passages
        return np.array([[float(text)] * DIM for text in passages], dtype=np.float32)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", {str(row): str(row) for row in range(10)})


def open_run(folder: Path, **changes: object) -> EncodingRun:
    folder.mkdir(exist_ok=True)
    settings = {"facts": FACTS, "count": 10, "dim": DIM, "chunk_size": 3, "restart": False} | changes
    return EncodingRun(folder, **settings)


def encode(run: EncodingRun, corpus: Path, encoder: CountingEncoder) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    encode_here(
        run, corpus=open_corpus(corpus), encoder=encoder, batch_size=2, report=lambda *told: seen.append(told)
    )
    return seen


def test_what_was_encoded_is_not_encoded_again(tmp_path: Path, numbers: Path) -> None:
    first = CountingEncoder(stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        encode(open_run(tmp_path / "run"), numbers, first)
    assert len(first.encoded) == 6
    again, second = open_run(tmp_path / "run", chunk_size=5), CountingEncoder()
    assert again.num_encoded == 6
    assert again.chunk_size == 3
    assert encode(again, numbers, second) == [(9, 10), (10, 10)]
    assert second.encoded == ["6", "7", "8", "9"]
    np.testing.assert_array_equal(again.vectors[:][:, 0], np.arange(10))
    assert again.list_unfinished() == []


def test_a_cut_off_log_line_does_not_count(tmp_path: Path, numbers: Path) -> None:
    run = open_run(tmp_path / "run")
    encode(run, numbers, CountingEncoder())
    log = tmp_path / "run" / "finished.log"
    log.write_text("0\n2\n3\n1")  # killed while it wrote 1 or 12
    again = open_run(tmp_path / "run")
    assert again.list_unfinished() == [1]
    again.finish(1)
    assert log.read_text() == "0\n2\n3\n1\n"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"facts": FACTS | {"encoder_sha256": "x"}}, "encoder_sha256: 'e' there, 'x' now"),
        ({"count": 11}, "count: 10 there, 11 now"),
    ],
)
def test_unfinished_work_of_another_build_is_kept_unless_told(
    tmp_path: Path, numbers: Path, changes: dict[str, object], named: str
) -> None:
    encode(open_run(tmp_path / "run"), numbers, CountingEncoder())
    with pytest.raises(RetrieverError, match=f"{named}.*--restart"):
        open_run(tmp_path / "run", **changes)
    assert open_run(tmp_path / "run").num_encoded == 10
    assert open_run(tmp_path / "run", restart=True, **changes).num_encoded == 0


def test_rows_of_a_vector_file(tmp_path: Path) -> None:
    file = VectorFile(tmp_path / "v", count=5, dim=3)
    rows = np.arange(15, dtype=np.float32).reshape(5, 3)
    file.write(rows[3:], start=3)
    file.write(rows[:3], start=0)
    np.testing.assert_array_equal(file[1:4], rows[1:4])
    assert file[5:9].shape == (0, 3)
    assert (len(file), file.shape) == (5, (5, 3))
    os.truncate(tmp_path / "v", 50)
    with pytest.raises(RetrieverError, match="v ends within row 4"):
        file[2:5]
    os.truncate(tmp_path / "v", 60)
    file.write(rows[3:], start=3)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "v", dtype=np.float32), rows.ravel())


@pytest.mark.slow
def test_an_encoding_process_that_cannot_or_dies_is_named(world: World, tmp_path: Path) -> None:
    spec = EncoderSpec(path=str(world.encoder), family="e5")

    def build(folder: str, corpus: Path) -> None:
        run = open_run(tmp_path / folder, count=len(PASSAGES), dim=32, chunk_size=1)
        job = EncodingJob(corpus_path=corpus, spec=spec, batch_size=4, num_threads=1)
        encode_in_processes(run, job, devices=["cpu"], report=lambda *_: None)

    with pytest.raises(RetrieverError, match="nowhere"):
        build("one", tmp_path / "nowhere")
    with ThreadPoolExecutor(1) as thread:
        building = thread.submit(build, "two", world.corpus)
        while not building.done():  # while it loads its model
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
            time.sleep(0.01)
        with pytest.raises(RetrieverError, match="an encoding process was killed"):
            building.result()


NUM_PASSAGES, CHUNK = 2000, 16
BUILD = """
import sys
from tests.search_r1.search.test_encoding_run import build
if __name__ == "__main__":
    build(*sys.argv[1:], num_processes=2)
"""


def build(corpus: str, encoder: str, index: str, *, num_processes: int) -> None:
    spec = EncoderSpec(path=encoder, family="e5")
    build_index(
        BuildOptions(
            corpus_path=Path(corpus),
            index_path=Path(index),
            num_threads=1,
            chunk_size=CHUNK,
            encoder=spec,
            batch_size=CHUNK,
            devices=("cpu",) * num_processes,
        )
    )


@pytest.mark.slow
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = " ".join(PASSAGES.values()).split()
    texts = [" ".join(words[(row * 7 + k) % len(words)] for k in range(20)) for row in range(NUM_PASSAGES)]
    corpus = write_corpus(tmp_path / "corpus.jsonl", {str(row): text for row, text in enumerate(texts)})
    encoder = save_encoder(tmp_path / "encoder", seed=0)
    index = tmp_path / "out" / "e5_Flat.index"
    files = [str(path) for path in (corpus, encoder, index)]
    log = index.with_name(index.name + ".building") / "finished.log"
    with (tmp_path / "log").open("w") as stream:
        builder = subprocess.Popen(
            [sys.executable, "-c", BUILD, *files], cwd=REPOSITORY, stdout=stream, stderr=stream
        )
    workers: list[psutil.Process] = []
    while not (log.exists() and len(log.read_text().split()) >= 3):
        assert builder.poll() is None, (tmp_path / "log").read_text()
        workers = psutil.Process(builder.pid).children()
        time.sleep(0.01)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert psutil.wait_procs(workers, timeout=200)[1] == []  # they end by themselves
    done = len(log.read_text().split())
    assert done < NUM_PASSAGES // CHUNK
    assert not index.exists()
    assert json.loads(log.with_name("run.json").read_text())["count"] == NUM_PASSAGES
    caplog.set_level(logging.INFO)
    build(*files, num_processes=1)
    assert f"continuing: {done * CHUNK} of {NUM_PASSAGES} passages" in caplog.text
    assert f"encoded {NUM_PASSAGES - done * CHUNK} passages in" in caplog.text
    assert sorted(path.name for path in index.parent.iterdir()) == [index.name, index.name + ".manifest.json"]
    encoder_here = TextEncoder(EncoderSpec(path=str(encoder), family="e5"), device="cpu")
    expected = encoder_here.encode_passages(texts)
    np.testing.assert_allclose(StoredVectors(index)[:NUM_PASSAGES], expected, atol=1e-5)

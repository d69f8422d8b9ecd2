"""What the retriever's benchmark and soak make, count and conclude."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bench_retriever import Kind, Speeds
from bench_retriever import summarize as summarize_bench
from soak_retriever import Answer, Clients, agree, ask_serially
from soak_retriever import summarize as summarize_soak

from bench import clustered
from bench.load import Load, ask_continuously
from bench.service import WORLD
from bench.soak import Statistics
from verl.utils.supervise import Supervisor, start_service

RIGHT: Answer = [("a", 0.9), ("b", 0.8), ("c", 0.7)]
SOAK = argparse.Namespace(queries=60, clients=8, seed=0)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server on the embedded world, started as the benchmarks start it."""
    log = tmp_path_factory.mktemp("retriever") / "server.log"
    module = "search_r1.search.retrieval_server"
    with Supervisor() as supervisor:
        yield start_service(
            supervisor, "the retriever", module=module, arguments=[], log=log, update=lambda *_: None
        )


def test_the_corpus_is_the_same_for_a_seed_and_its_topics_share_words(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "other.jsonl")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        clustered.write_corpus(path, size=1000, seed=seed, report=lambda _: None)
    one, two, other = (path.read_text() for path in paths)
    assert one == two != other
    rows = [json.loads(line) for line in one.splitlines()]
    assert [row["id"] for row in rows] == [str(number) for number in range(1000)]
    words = [set(row["contents"].split("\n")[1].split()) for row in rows]
    # 1000 passages have 5 topics: row 0 and row 5 are of the same one.
    assert len(words[0] & words[5]) >= clustered.TOPIC_WORDS - 1
    assert len(words[0] & words[1]) < 3
    asked = list(clustered.queries(1000, corpus_seed=1, count=50, seed=3))
    assert len(set(asked)) == 50
    of_topics = [max(len(set(query.split()) & of_passage) for of_passage in words) for query in asked]
    assert min(of_topics) >= clustered.TOPIC_WORDS - 1


@pytest.mark.slow
def test_the_table_encoder_puts_a_topic_together(tmp_path: Path) -> None:
    from search_r1.search.encoder import TextEncoder

    clustered.save_encoder(tmp_path / "encoder", dim=64, seed=0)
    clustered.write_corpus(tmp_path / "corpus.jsonl", size=400, seed=0, report=lambda _: None)
    encoder = TextEncoder(tmp_path / "encoder")
    rows = (tmp_path / "corpus.jsonl").read_text().splitlines()
    vectors = encoder.encode_passages([json.loads(row)["contents"] for row in rows])
    assert vectors.shape == (400, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    likeness = vectors @ vectors.T
    same = np.arange(400)[:, None] % 2 == np.arange(400)[None, :] % 2  # two topics, in turn
    assert likeness[same].mean() > likeness[~same].mean() + 0.2


def test_ratios_are_of_means_over_the_rounds() -> None:
    speeds = Speeds(
        batched=[
            Load(seconds=2.0, latencies_s=[0.5] * 100),
            Load(seconds=2.0, latencies_s=[1.0] * 300),
        ],
        unbatched=[Load(seconds=2.0, latencies_s=[9.0] * 10)],
        bare_per_s=[120.0, 130.0],
    )
    arguments = argparse.Namespace(passages=10, clients=64)
    kind = Kind(
        qps=1.0,
        recall_at_3=1.0,
        memory_mb=1.0,
        memory_vs_flat=1.0,
        start_s=1.0,
        disk_mb=1.0,
        build_s=1.0,
        build_peak_mb=1.0,
    )
    summary = summarize_bench(speeds, kinds={"flat": kind}, arguments=arguments, base_bytes=5_000_000)
    assert summary.qps_64 == 100.0
    assert summary.vs_unbatched == 20.0
    assert summary.vs_bare_index == 0.8
    assert (summary.p50_ms, summary.p99_ms) == (1000.0, 1000.0)
    assert summary.base_memory_mb == 5.0


@pytest.mark.slow
async def test_the_load_counts_full_answers_only(url: str) -> None:
    asked = [f"query {number}" for number in range(100_000)]
    load = await ask_continuously(url, asked, clients=4, topk=2, seconds=2.0, warm_up_s=0.1)
    assert load.latencies_s
    assert all(latency > 0 for latency in load.latencies_s)
    with pytest.raises(ExceptionGroup):  # a request for so many is refused
        await ask_continuously(url, asked, clients=2, topk=10_000, seconds=0.3, warm_up_s=0.0)


@pytest.mark.parametrize(
    ("found", "same"),
    [
        (RIGHT, True),
        ([("a", 0.900004), ("b", 0.8), ("c", 0.7)], True),
        ([("a", 0.9001), ("b", 0.8), ("c", 0.7)], False),
        ([("b", 0.9), ("a", 0.8), ("c", 0.7)], False),
        ([("a", 0.9), ("b", 0.8), ("d", 0.7)], True),  # scores like the last one
        ([("a", 0.9), ("d", 0.8), ("c", 0.7)], False),
        (RIGHT[:2], False),
    ],
)
def test_answers_agree_up_to_rounding_and_ties(found: Answer, same: bool) -> None:
    assert agree(found, RIGHT) == same


@pytest.mark.slow
async def test_the_soak_passes_a_server_that_is_right_and_no_other(url: str) -> None:
    questions = pq.read_table(WORLD / "test.parquet", columns=["question"])["question"].to_pylist()[:20]
    right = ask_serially(url, questions, update=lambda *_: None)
    clients = Clients(url, questions, right=right, arguments=SOAK)
    await clients.run()
    assert summarize_soak(clients.statistics, arguments=SOAK, seconds=1, ends=(100, 105)).passed, (
        clients.statistics
    )
    assert not summarize_soak(clients.statistics, arguments=SOAK, seconds=1, ends=(100, 111)).passed
    clients.statistics.statuses[500] += 1
    assert not summarize_soak(clients.statistics, arguments=SOAK, seconds=1, ends=(100, 100)).passed
    wrong = Clients(url, questions, right=[answer[::-1] for answer in right], arguments=SOAK)
    await wrong.run()
    assert wrong.statistics.wrong > 0
    assert not summarize_soak(wrong.statistics, arguments=SOAK, seconds=1, ends=(100, 100)).passed


def test_a_soak_that_asked_too_little_has_not_passed() -> None:
    assert not summarize_soak(Statistics(), arguments=SOAK, seconds=1, ends=(100, 100)).passed

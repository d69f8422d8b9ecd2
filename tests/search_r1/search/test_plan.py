from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from search_r1.search import plan
from search_r1.search.errors import RetrieverError
from search_r1.search.estimates import Rates, estimate, recommend, show_seconds
from search_r1.search.estimates import plan as plan_kinds
from search_r1.search.kinds import IndexKind, IndexOptions, parse_options
from search_r1.search.sizes import count_bytes, parse_bytes, show_bytes
from search_r1.search.vector_index import list_index_files, write_index
from tests.search_r1.search.vectors import make_vectors

WIKI = 21_015_324


@pytest.mark.parametrize(
    "name",
    ["flat", "fp16", "sq8", "ivf", "ivf_pq", "hnsw", "binary", "HNSW8,Flat", "IVF32,Flat", "IVF64,PQ32"],
)
def test_the_bytes_of_the_formula_are_those_of_the_built_files(name: str, tmp_path: Path) -> None:
    vectors = make_vectors(4000, 128)
    options = write_index(vectors, tmp_path / "index", options=parse_options(name), num_threads=1)
    expected = count_bytes(options, *vectors.shape)
    files = [file.stat().st_size for file in list_index_files(tmp_path / "index", options.kind)]
    headers = 2500  # of the scalar quantizer: two float32 per dimension and a little
    assert files[0] == pytest.approx(expected.main, rel=0.02, abs=headers)
    assert sum(files[1:]) == pytest.approx(expected.vectors, rel=0.02, abs=headers)


def test_the_published_index_has_the_size_that_is_known() -> None:
    assert count_bytes(IndexOptions(), WIKI, 768).disk == 64_559_075_328


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("16GiB", 16 * 2**30), ("1.5 tb", 1_500_000_000_000), ("512 MiB", 2**29)],
)
def test_sizes_are_read_in_both_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["16", "16G", "GB", "-1GB", "0GB", "16 GBit", ""])
def test_sizes_that_are_not_clear_are_refused(text: str) -> None:
    with pytest.raises(RetrieverError, match="16GB"):
        parse_bytes(text)


def test_bytes_and_seconds_are_shown_in_fitting_units() -> None:
    assert [show_bytes(count) for count in (12, 1500, 64_559_075_328)] == ["12 B", "1.5 kB", "64.6 GB"]
    assert [show_seconds(s) for s in (2e-4, 0.0213, 13, 3660, 7200)] == [
        "200 us", "21 ms", "13 s", "61 min", "2.0 h",
    ]  # fmt: skip


def test_wiki_on_a_small_machine_gets_an_index_that_fits() -> None:
    rows = plan_kinds(WIKI, 768, threads=2)
    recommended = recommend(rows, parse_bytes("16GB"))
    chosen = {row.kind: row for row in rows}[recommended.kind or ""]
    assert max(chosen.memory_bytes, chosen.build_peak_bytes) < 16e9
    assert chosen.kind in ("ivf_pq", "binary")
    assert "too large for that memory: flat, fp16, sq8, ivf, hnsw" in recommended.reason


def test_the_most_exact_kind_that_is_fast_enough_is_recommended() -> None:
    rows = plan_kinds(100_000, 768, threads=2)
    assert recommend(rows, parse_bytes("16GB")).kind == "flat"
    slow = recommend(rows, parse_bytes("16GB"), batch_s=1e-9)
    assert slow.kind == min(rows, key=lambda row: row.batch_s).kind
    assert "no kind that fits answers in the time asked for" in slow.reason


def test_where_nothing_fits_it_says_what_would_be_needed() -> None:
    recommended = recommend(plan_kinds(WIKI, 768), parse_bytes("1GB"))
    assert recommended.kind is None
    assert "the smallest, binary, needs 3." in recommended.reason


def test_twice_the_cores_take_half_the_time_and_faster_cores_less() -> None:
    one, two = (estimate(IndexOptions(), 10**6, 768, threads=threads) for threads in (1, 2))
    assert one.query_s == pytest.approx(2 * two.query_s)
    faster = estimate(IndexOptions(), 10**6, 768, rates=Rates(products=1e15, stream_bytes=1e15))
    assert faster.batch_s < one.batch_s / 10


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    status = plan.run(parser.parse_args(flags))
    return status, capsys.readouterr().out


def test_the_table_names_every_kind_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = run(capsys, "--n", str(WIKI), "--ram", "16GB", "--threads", "2")
    assert status == 0
    for word in (*IndexKind, "64.6 GB", "Estimates", "assumed", "--kind ivf_pq", "14.9 GiB"):
        assert word in shown


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = run(capsys, "--n", "1000", "--ram", "100MB", "--json", "--kind", "HNSW64")
    facts = json.loads(shown)
    assert status == 1
    assert facts["recommended"] is facts["command"] is None
    assert facts["kinds"][0]["parameters"] == {"storage": "flat", "num_links": 64, "ef_construction": 80}
    assert facts["rates_measured_here"] is False


def test_the_command_builds_what_was_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    _, shown = run(capsys, "--n", "1000", "--ram", "16GB", "--json", "--kind", "HNSW64,SQ8")
    assert json.loads(shown)["command"].endswith("--kind HNSW64,SQ8")


def test_numbers_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RetrieverError, match="--n must be greater than 0, got 0"):
        run(capsys, "--n", "0")


def test_of_two_of_one_kind_the_command_builds_the_recommended(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["--kind", "IVF2048,PQ64", "--kind", "IVF4096,PQ96"]
    for given in (kinds, [*kinds[2:], *kinds[:2]]):
        _, shown = run(capsys, "--n", "1000000", "--ram", "16GB", "--json", *given)
        facts = json.loads(shown)
        assert facts["kinds"][given.index("IVF2048,PQ64") // 2]["disk_bytes"] < 850e6
        assert facts["command"].endswith("--kind IVF2048,PQ64")

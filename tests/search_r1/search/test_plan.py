from __future__ import annotations

from pathlib import Path

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.faiss_index import write_index
from search_r1.search.index_cli import main
from search_r1.search.kinds import parse_options
from search_r1.search.plan import estimate, parse_bytes, show_bytes
from tests.search_r1.search.vectors import make_vectors


@pytest.mark.parametrize(
    "name", ["flat", "fp16", "sq8", "IVF64,PQ8", "IVF64,PQ8,Refine(SQ6)", "HNSW8,Flat", "HNSW16,SQ8"]
)
def test_the_bytes_of_the_formula_are_those_of_the_built_file(name: str, tmp_path: Path) -> None:
    count, dim = 5_000, 32
    options = parse_options(name)
    write_index(make_vectors(count, dim), tmp_path / "index", options=options, num_threads=1)
    disk = (tmp_path / "index").stat().st_size
    assert estimate(options, count, dim).disk == pytest.approx(disk, rel=0.02, abs=1000)


def test_wikipedia_on_a_small_machine_gets_an_index_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--n", "21015324", "--dim", "768", "--ram"]
    assert main([*command, "16GB"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "64.6 GB" in shown
    assert "With 16.0 GB of RAM: ivf_pq. Build it:" in shown
    assert "20.4 GB" in shown
    assert main([*command, "100GB"]) == 0
    assert "RAM: flat." in capsys.readouterr().out
    assert main([*command, "2GB"]) == 1
    assert "nothing fits; the smallest needs" in capsys.readouterr().out
    assert main([*command, "64GB", "--kind", "IVF16384,PQ64", "--kind", "sq8"]) == 0
    assert "--kind IVF16384,PQ64" in " ".join(capsys.readouterr().out.split())


def test_sizes_are_read_and_shown() -> None:
    assert [parse_bytes(text) for text in ("16GB", "1.5 GiB", "3kb")] == [16 * 10**9, 3 * 2**29, 3000]
    assert [show_bytes(count) for count in (64_559_075_328, 999, 1500)] == ["64.6 GB", "999 B", "1.5 KB"]
    for text in ("16", "16G", "GB", "-1GB", "0GB", ""):
        with pytest.raises(RetrieverError, match="is not clear"):
            parse_bytes(text)


def test_numbers_that_make_no_sense_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["plan", "--n", "0"]) == 1
    assert "--n must be greater than 0, got 0" in caplog.text

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from search_r1.search import recall
from search_r1.search.encoder import TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.index_builder import build_index
from search_r1.search.kinds import IndexKind, IndexOptions, SearchOptions, parse_options
from search_r1.search.recall import compare_rows, measure_recall, take_query
from search_r1.search.vector_index import open_index, open_vectors, write_index
from tests.search_r1.search.small_world import PASSAGES, save_encoder, write_corpus
from tests.search_r1.search.vectors import make_queries, make_vectors


def test_recall_by_hand() -> None:
    found = np.array([[1, 2, 3], [9, 5, -1]])
    expected = np.array([[1, 3, 4], [5, 6, 7]])
    assert compare_rows(found, expected, k=1) == 0.5  # row 1; not row 5
    assert compare_rows(found, expected, k=3) == pytest.approx(3 / 6)  # rows 1, 3 and 5
    assert compare_rows(found[1:], np.array([[-1, -1, 5]]), k=3) == 1.0


def test_recall_of_an_index_is_measured_against_vectors_or_an_exact_index(tmp_path: Path) -> None:
    vectors = make_vectors(2000, 32)
    queries = make_queries(vectors, 100)
    write_index(vectors, tmp_path / "flat", options=IndexOptions())
    write_index(vectors, tmp_path / "ivf", options=parse_options("IVF32,Flat"))
    hasty = open_index(tmp_path / "ivf", search=SearchOptions(nprobe=1))
    thorough = open_index(tmp_path / "ivf", search=SearchOptions(nprobe=32))
    by_vectors = measure_recall(hasty, reference=vectors, queries=queries)
    by_index = measure_recall(hasty, reference=open_index(tmp_path / "flat"), queries=queries)
    assert (
        by_vectors
        == by_index
        == measure_recall(hasty, reference=open_vectors(tmp_path / "flat"), queries=queries)
    )
    assert 0.1 < by_vectors.at[10] < 0.99
    assert measure_recall(thorough, reference=vectors, queries=queries).at == {1: 1.0, 3: 1.0, 10: 1.0}
    assert list(by_vectors.as_facts()) == ["kind", "num_queries", "recall@1", "recall@3", "recall@10"]


def test_a_reference_of_other_vectors_is_refused(tmp_path: Path) -> None:
    vectors = make_vectors(20, 8)
    write_index(vectors, tmp_path / "flat", options=IndexOptions())
    index = open_index(tmp_path / "flat")
    with pytest.raises(RetrieverError, match="holds 20 vectors, the reference 19"):
        measure_recall(index, reference=vectors[:19], queries=vectors[:2])
    with pytest.raises(RetrieverError, match="no queries"):
        measure_recall(index, reference=vectors, queries=vectors[:0])


def test_a_query_is_the_first_sentence_without_the_title() -> None:
    assert take_query('"Bolton"\nBolton is a town. It lies in England.') == "Bolton is a town."
    assert take_query("only a title") == "only a title"


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    corpus = write_corpus(tmp_path / "corpus.jsonl", PASSAGES)
    encoder = save_encoder(tmp_path / "encoder", seed=0)
    vectors = TextEncoder(encoder, retriever_name="e5").encode_passages(list(PASSAGES.values()))
    for kind in (IndexKind.FLAT, IndexKind.SQ8, IndexKind.BINARY):
        write_index(vectors, tmp_path / kind, options=IndexOptions(kind=kind))
    return {
        "--corpus_path": str(corpus),
        "--retriever_model": str(encoder),
        "--retriever_name": "e5",
        "--index_path": str(tmp_path / "sq8"),
    }


def run(capsys: pytest.CaptureFixture[str], world: dict[str, str], *flags: str) -> str:
    parser = argparse.ArgumentParser()
    recall.add_arguments(parser)
    given = [word for pair in world.items() for word in pair]
    assert recall.run(parser.parse_args([*given, *flags])) == 0
    return capsys.readouterr().out


def test_the_command_measures_against_a_flat_index(
    capsys: pytest.CaptureFixture[str], world: dict[str, str], tmp_path: Path
) -> None:
    facts = json.loads(run(capsys, world, "--reference_path", str(tmp_path / "flat"), "--json"))
    assert facts["recall@1"] == 1.0
    assert facts["num_queries"] == len(PASSAGES)
    assert "flat" in facts["reference"]
    assert "recall@3" in run(capsys, world, "--reference_path", str(tmp_path / "flat"))


def test_without_a_reference_passages_are_encoded_again_only_if_asked(
    capsys: pytest.CaptureFixture[str], world: dict[str, str]
) -> None:
    with pytest.raises(RetrieverError, match="--reencode"):
        run(capsys, world)
    facts = json.loads(run(capsys, world, "--reencode", "--json"))
    assert facts["recall@1"] == 1.0


def test_an_index_with_vectors_for_rescoring_is_measured_against_those_and_says_so(
    capsys: pytest.CaptureFixture[str], world: dict[str, str], tmp_path: Path
) -> None:
    facts = json.loads(run(capsys, world | {"--index_path": str(tmp_path / "binary")}, "--json"))
    assert "its own binary.vectors" in facts["reference"].replace("the index's own", "its own")


def test_an_encoder_may_be_told_how_it_encodes_but_not_otherwise_than_the_manifest_says(
    capsys: pytest.CaptureFixture[str], world: dict[str, str], tmp_path: Path
) -> None:
    del world["--retriever_name"]
    told = ["--pooling_method", "mean", "--query_prefix", "", "--passage_prefix", "", "--reencode", "--json"]
    with pytest.raises(RetrieverError, match="--passage_prefix"):
        run(capsys, world, "--reencode")
    assert json.loads(run(capsys, world, *told))["num_queries"] == len(PASSAGES)
    corpus, encoder = (Path(world[flag]) for flag in ("--corpus_path", "--retriever_model"))
    build_index(corpus, encoder_path=encoder, index_path=tmp_path / "own", retriever_name="e5")
    capsys.readouterr()
    with pytest.raises(RetrieverError, match="passage_prefix: index was built with 'passage: ', found ''"):
        run(capsys, world | {"--index_path": str(tmp_path / "own")}, *told)


def test_queries_are_read_from_a_file(
    capsys: pytest.CaptureFixture[str], world: dict[str, str], tmp_path: Path
) -> None:
    queries = tmp_path / "queries"
    queries.write_text('{"question": "where is bolton"}\n\nwho is alice marsh\n')
    facts = json.loads(run(capsys, world, "--queries", str(queries), "--reencode", "--json"))
    assert facts["num_queries"] == 2
    queries.write_text('fine\n{"text": 1}\n')
    with pytest.raises(RetrieverError, match=r"queries:2 has no 'question' or 'query', only \['text'\]"):
        run(capsys, world, "--queries", str(queries), "--reencode")


def test_recall_of_what_does_not_belong_together_is_not_measured(
    capsys: pytest.CaptureFixture[str], world: dict[str, str], tmp_path: Path
) -> None:
    encoder = Path(world["--retriever_model"])
    for name, passages in (
        ("own", PASSAGES),
        ("other", dict(zip(PASSAGES, reversed(PASSAGES.values()), strict=True))),
    ):
        path = write_corpus(tmp_path / f"{name}.jsonl", passages)
        build_index(path, encoder_path=encoder, index_path=tmp_path / name, retriever_name="e5")
    own = world | {"--index_path": str(tmp_path / "own")}
    assert "recall@1" in run(capsys, own, "--reference_path", str(tmp_path / "own"))
    with pytest.raises(RetrieverError, match=r"index .*other cannot be measured.*\n  corpus\.fingerprint: "):
        run(capsys, own, "--reference_path", str(tmp_path / "other"))
    own["--corpus_path"] = str(tmp_path / "other.jsonl")
    with pytest.raises(RetrieverError, match=r"index .*own cannot be measured.*\n  corpus\.fingerprint: "):
        run(capsys, own)

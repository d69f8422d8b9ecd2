from __future__ import annotations

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import (
    IndexKind,
    IndexOptions,
    SearchOptions,
    Storage,
    choose_num_lists,
    parse_options,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Flat", IndexKind.FLAT),
        ("flat", IndexKind.FLAT),
        ("SQ8", IndexKind.SQ8),
        ("SQfp16", IndexKind.FP16),
        ("fp16", IndexKind.FP16),
        ("IVF-PQ", IndexKind.IVF_PQ),
        ("ivf_pq", IndexKind.IVF_PQ),
        ("HNSW", IndexKind.HNSW),
        ("binary", IndexKind.BINARY),
    ],
)
def test_a_kind_is_known_by_our_name_and_by_that_of_faiss(name: str, kind: IndexKind) -> None:
    assert parse_options(name) == IndexOptions(kind=kind)


def test_a_factory_string_sets_the_parameters() -> None:
    assert parse_options("HNSW64") == IndexOptions(kind=IndexKind.HNSW, num_links=64, storage=Storage.FLAT)
    assert parse_options("IVF4096,SQ8") == IndexOptions(
        kind=IndexKind.IVF, num_lists=4096, storage=Storage.SQ8
    )
    assert parse_options("IVF4096,PQ96") == IndexOptions(kind=IndexKind.IVF_PQ, num_lists=4096, pq_bytes=96)


def test_an_unknown_kind_is_refused_with_what_is_known() -> None:
    with pytest.raises(RetrieverError, match=r"'annoy'.*flat.*binary"):
        parse_options("annoy")


def test_defaults_follow_the_number_of_vectors_and_only_the_options_of_the_kind_are_set() -> None:
    resolved = IndexOptions(kind=IndexKind.IVF_PQ).resolve(1_000_000, 768)
    assert resolved.as_facts() == {
        "kind": "ivf_pq",
        "num_lists": 4096,
        "pq_bytes": 96,
        "rescore_storage": "sq8",
        "seed": 0,
    }
    assert IndexOptions().resolve(10, 8).as_facts() == {"kind": "flat", "seed": 0}
    assert choose_num_lists(21_015_324) == 16384
    assert choose_num_lists(1) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (IndexOptions(kind=IndexKind.FLAT, num_lists=4), "num_lists"),
        (IndexOptions(kind=IndexKind.IVF, num_lists=101), "num_lists is 101"),
        (IndexOptions(kind=IndexKind.IVF, num_lists=0), "num_lists"),
        (IndexOptions(kind=IndexKind.IVF_PQ, pq_bytes=5), "pq_bytes is 5"),
        (IndexOptions(kind=IndexKind.HNSW, num_links=1), "num_links"),
        (IndexOptions(kind=IndexKind.BINARY, rescore_storage=Storage.NONE), "rescore_storage"),
    ],
)
def test_what_does_not_go_together_is_named(options: IndexOptions, named: str) -> None:
    with pytest.raises(RetrieverError, match=named):
        options.resolve(100, 16)


def test_search_options_have_defaults_of_the_kind_and_bounds() -> None:
    assert SearchOptions().choose_nprobe(4096) == 64
    assert SearchOptions(nprobe=10).choose_nprobe(4) == 4
    assert SearchOptions(ef_search=8).choose_ef_search(20) == 20
    assert SearchOptions(rescore_factor=7).choose_rescored(IndexKind.BINARY, 3) == 21
    with pytest.raises(RetrieverError, match="nprobe"):
        SearchOptions(nprobe=0)

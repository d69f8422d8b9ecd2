"""Reranking: who reads what, in which order it comes out, and what a model is refused for."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from search_r1.search.errors import RetrieverError
from search_r1.search.rerank import CrossEncoderReranker, RerankedRetriever
from search_r1.search.retriever import FailureKind, Found, Hit, Outcome, SearchFailure
from search_r1.search.schema import Document
from tests.search_r1.search.tiny_models import save_cross_encoder, save_transformer

BROKEN = SearchFailure(kind=FailureKind.UNAVAILABLE, reason="down")


def find(*texts: str) -> Found:
    return tuple(
        Hit(document=Document(id=text, contents=text), score=9.0 - rank) for rank, text in enumerate(texts)
    )


class Inner:
    """Finds what its table says."""

    max_batch = 256
    num_parallel_calls = 3
    num_passages = 11

    def __init__(self, table: Mapping[str, Outcome]) -> None:
        self.depths: list[int] = []
        self.is_closed = False
        self._table = table

    def describe(self) -> Mapping[str, str | int | float | None]:
        return {"retriever": "inner"}

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        self.depths.append(topk)
        outcomes = [self._table[query] for query in queries]
        return [found if isinstance(found, SearchFailure) else found[:topk] for found in outcomes]

    async def aclose(self) -> None:
        self.is_closed = True


class Judge:
    """Scores a pair by a table, else by the length of its document; remembers pairs and threads."""

    def __init__(self, scores: Mapping[tuple[str, str], float] | None = None) -> None:
        self.calls: list[list[tuple[str, str]]] = []
        self.threads: set[int] = set()
        self._scores = scores or {}

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self.calls.append(list(pairs))
        self.threads.add(threading.get_ident())
        return [self._scores.get(pair, float(len(pair[1]))) for pair in pairs]

    def describe(self) -> Mapping[str, str | int | float | None]:
        return {"reranker": "judge", "reranker_sha256": "f00"}


def list_ids(outcome: Outcome) -> list[str]:
    assert not isinstance(outcome, SearchFailure)
    return [hit.document.id for hit in outcome]


async def test_each_query_is_read_with_its_own_documents_only_in_one_batch() -> None:
    inner = Inner({"p": find("a", "bbb", "cc", "dddd"), "q": find("eeeee", "f"), "r": find("g")})
    judge = Judge()
    reranked = RerankedRetriever(inner, model=judge, depth=3)
    outcomes = await reranked.search(["p", "q", "r"], topk=2, timeout_s=5)
    pairs = [("p", "a"), ("p", "bbb"), ("p", "cc"), ("q", "eeeee"), ("q", "f"), ("r", "g")]
    assert judge.calls == [pairs]  # the fourth of p is beyond the depth
    assert inner.depths == [3]
    assert [list_ids(found) for found in outcomes] == [["bbb", "cc"], ["eeeee", "f"], ["g"]]
    first = outcomes[0]
    assert not isinstance(first, SearchFailure)
    assert [hit.score for hit in first] == [3.0, 2.0]  # the model's, not the inner one's
    assert judge.threads.isdisjoint({threading.get_ident()})
    await reranked.aclose()
    assert inner.is_closed


async def test_failures_and_empty_answers_pass_through_unread() -> None:
    inner = Inner({"bad": BROKEN, "": (), "p": find("a", "bb")})
    judge = Judge()
    reranked = RerankedRetriever(inner, model=judge, depth=5)
    outcomes = await reranked.search(["bad", "", "p"], topk=1, timeout_s=5)
    assert outcomes[0] is BROKEN
    assert outcomes[1] == ()
    assert list_ids(outcomes[2]) == ["bb"]
    assert await reranked.search(["bad", ""], topk=1, timeout_s=5) == [BROKEN, ()]
    assert len(judge.calls) == 1


@pytest.mark.parametrize("score", [math.nan, math.inf])
async def test_a_score_that_is_no_number_fails_its_query_and_no_other(score: float) -> None:
    inner = Inner({"p": find("a", "bb"), "q": find("a", "bb")})
    reranked = RerankedRetriever(inner, model=Judge({("p", "bb"): score}), depth=2)
    spoilt, whole = await reranked.search(["p", "q"], topk=2, timeout_s=5)
    assert isinstance(spoilt, SearchFailure)
    assert (spoilt.kind, "not a number" in spoilt.reason) == (FailureKind.INTERNAL, True)
    assert list_ids(whole) == ["bb", "a"]


async def test_a_model_that_breaks_fails_what_it_should_have_read() -> None:
    class Breaking(Judge):
        def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
            raise RuntimeError("out of memory\ntrace")

    reranked = RerankedRetriever(Inner({"p": find("a"), "": ()}), model=Breaking(), depth=2)
    broken, empty = await reranked.search(["p", ""], topk=1, timeout_s=5)
    assert broken == SearchFailure(kind=FailureKind.INTERNAL, reason="the reranker failed: out of memory")
    assert empty == ()


async def test_nothing_is_read_for_those_whose_deadline_passes_while_others_are_read() -> None:
    started, released = threading.Event(), threading.Event()

    class Gated(Judge):
        def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
            started.set()
            released.wait()
            return super().score(pairs)

    judge = Gated()
    reranked = RerankedRetriever(Inner({"p": find("a"), "q": find("b")}), model=judge, depth=2)
    patient = asyncio.create_task(reranked.search(["p"], topk=1, timeout_s=600))
    await asyncio.to_thread(started.wait)
    hasty = asyncio.create_task(reranked.search(["q"], topk=1, timeout_s=0))
    released.set()
    [late] = await hasty
    assert isinstance(late, SearchFailure)
    assert late.kind is FailureKind.DEADLINE
    assert list_ids((await patient)[0]) == ["a"]
    assert judge.calls == [[("p", "a")]]
    await reranked.aclose()


def test_facts_of_both_and_bounded_batches() -> None:
    reranked = RerankedRetriever(Inner({}), model=Judge(), depth=20)
    facts = {"retriever": "inner", "reranker": "judge", "reranker_sha256": "f00", "rerank_depth": 20}
    assert reranked.describe() == facts
    assert reranked.max_batch == 51  # 1024 pairs
    assert (reranked.num_passages, reranked.num_parallel_calls) == (11, 3)
    assert RerankedRetriever(Inner({}), model=Judge(), depth=2000).max_batch == 1


# ------------------------------------------------------------------------------------------- the real models


PAIRS = [("the cat", "a cat sat"), ("old ship", "the ship lies in the harbour"), ("the cat", "river flows")]


def score_by_hand(folder: Path, *, max_length: int = 64) -> list[float]:
    """Logits, one pair at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [
            float(
                model(
                    **tokenizer(query, text, return_tensors="pt", truncation=True, max_length=max_length)
                ).logits[0, 0]
            )
            for query, text in PAIRS
        ]


def test_scores_are_the_models_own(tmp_path: Path) -> None:
    """Sigmoid unless the model says otherwise; in one padded batch as by hand."""
    folder = save_cross_encoder(tmp_path / "tiny")
    reranker = CrossEncoderReranker(folder, device="cpu")
    logits = np.array(score_by_hand(folder))
    np.testing.assert_allclose(reranker.score(PAIRS), 1 / (1 + np.exp(-logits)), atol=1e-6)
    facts = reranker.describe()
    assert (facts["reranker"], facts["reranker_max_length"]) == ("tiny", 64)
    assert facts["reranker_activation"] == "Sigmoid"
    assert reranker.score([]) == []
    identity = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    other = CrossEncoderReranker(save_cross_encoder(tmp_path / "identity", **identity), device="cpu")
    np.testing.assert_allclose(other.score(PAIRS), logits, atol=1e-5)
    assert other.describe()["reranker_activation"] == "Identity"
    assert other.describe()["reranker_sha256"] != facts["reranker_sha256"]


def test_models_that_are_no_reranker_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="has 3 classes, expected a model with one score"):
        CrossEncoderReranker(save_cross_encoder(tmp_path / "classes", num_labels=3), device="cpu")
    with pytest.raises(RetrieverError, match=r"lacks the weights \['classifier\.bias', .*not the encoder"):
        CrossEncoderReranker(save_transformer(tmp_path / "encoder"), device="cpu")
    with pytest.raises(RetrieverError, match=r"reranker .*nowhere: no such folder"):
        CrossEncoderReranker(tmp_path / "nowhere", device="cpu")
    folder = save_cross_encoder(tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RetrieverError, match="a pickle"):
        CrossEncoderReranker(folder, device="cpu")
    folder = save_cross_encoder(tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RetrieverError, match=r"lacks the weights \['classifier\.weight'\]"):
        CrossEncoderReranker(folder, device="cpu")

"""Reranking: a cross-encoder reads each query with the documents found for it and reorders them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from sentence_transformers import CrossEncoder

from search_r1.search.encoder import silence_transformers
from search_r1.search.errors import RetrieverError
from search_r1.search.model_files import (
    check_weights,
    find_model,
    hash_model,
    list_absent_weights,
    list_module_files,
    name_model,
    read_length_limit,
    read_modules,
)
from search_r1.search.retriever import FailureKind, Found, Hit, Outcome, Retriever, SearchFailure
from serving.weights import copy_weights

logger = logging.getLogger(__name__)

_BATCH_SIZE = 32
_MAX_PAIRS = 1024
"""Pairs of one call, which cannot be interrupted: a small cross-encoder reads hundreds a second on a CPU."""

_LATE = SearchFailure(kind=FailureKind.DEADLINE, reason="the documents came too late to be reranked")


class Reranker(Protocol):
    """Scores how well documents answer queries. Called from one thread at a time."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return one score for every (query, document), higher is better; not finite stands for none."""
        ...

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return what its scores depend on."""
        ...


class CrossEncoderReranker:
    """A sequence classifier with one label, over pairs. Not thread-safe. fp32 on a CPU, fp16 on a GPU."""

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | None = None,
    ) -> None:
        """Load `path`, a folder or a hub id. Raises RetrieverError when it is not such a model.

        `device` None: a GPU if there is one.
        """
        folder = find_model(path, role="reranker")
        check_weights(folder, role="reranker")
        transformer = folder / (read_modules(folder) or [("", "")])[0][1]
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._name = name_model(folder)
        self._model = _load_cross_encoder(folder, transformer=transformer, device=device)
        limit = self._model.max_seq_length
        self._model.max_seq_length = min(limit, read_length_limit(transformer) or limit)
        self._sha256 = hash_model(folder, further=list_module_files(folder))

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the scores of pairs, with the activation that the model was made for."""
        if not pairs:
            return []
        scores = self._model.predict(list(pairs), batch_size=_BATCH_SIZE, show_progress_bar=False)
        return [float(score) for score in scores]

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return name, hash and parameters."""
        return {
            "reranker": self._name,
            "reranker_sha256": self._sha256,
            "reranker_max_length": self._model.max_seq_length,
            "reranker_activation": type(self._model.activation_fn).__name__,
        }


class RerankedRetriever:
    """Searches `inner` for `depth` documents per query and returns those that the model scores best.

    A query is scored with its own documents only, all queries of a call in one batch, in a thread. The scores
    of the hits are the model's. A query that `inner` failed stays failed.
    """

    def __init__(self, inner: Retriever, *, model: Reranker, depth: int) -> None:
        """Let the model read `depth` documents per query, more if more are asked for."""
        self.max_batch = max(1, min(inner.max_batch, _MAX_PAIRS // depth))
        self.num_parallel_calls = inner.num_parallel_calls
        self._inner = inner
        self._model = model
        self._depth = depth
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rerank")

    @property
    def num_passages(self) -> int | None:
        """Return the number of passages in the corpus of `inner`."""
        return self._inner.num_passages

    def describe(self) -> Mapping[str, str | int | float | None]:
        """Return the facts of both."""
        return {**self._inner.describe(), **self._model.describe(), "rerank_depth": self._depth}

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        """Search, then rerank what was found."""
        end = time.monotonic() + timeout_s
        outcomes = await self._inner.search(queries, topk=max(self._depth, topk), timeout_s=timeout_s)
        asked = [(query, found) for query, found in zip(queries, outcomes, strict=True) if _has_hits(found)]
        if not asked:
            return outcomes
        loop = asyncio.get_running_loop()
        reranked = iter(await loop.run_in_executor(self._thread, self._rerank, asked, end))
        return [_cut(next(reranked), topk) if _has_hits(found) else found for found in outcomes]

    async def aclose(self) -> None:
        """Wait for the running batch and cancel those that wait; then close the inner one."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        await self._inner.aclose()

    def _rerank(self, asked: Sequence[tuple[str, Outcome]], end: float) -> list[Outcome]:
        """Rerank unless the deadline `end` passed while other batches were read."""
        if time.monotonic() >= end:
            return [_LATE] * len(asked)
        found = [(query, hits) for query, hits in asked if not isinstance(hits, SearchFailure)]
        pairs = [(query, hit.document.contents) for query, hits in found for hit in hits]
        try:
            scores = iter(self._model.score(pairs))
        except RuntimeError as error:  # torch: out of memory, for one
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            logger.exception("reranking %d pairs failed", len(pairs))
            failure = SearchFailure(kind=FailureKind.INTERNAL, reason=f"the reranker failed: {first_line}")
            return [failure] * len(found)
        return [_order(hits, [next(scores) for _ in hits]) for _, hits in found]


def _has_hits(outcome: Outcome) -> bool:
    return not isinstance(outcome, SearchFailure) and len(outcome) > 0


def _cut(outcome: Outcome, topk: int) -> Outcome:
    return outcome if isinstance(outcome, SearchFailure) else outcome[:topk]


def _order(hits: Found, scores: Sequence[float]) -> Outcome:
    """Return the best score first, equal ones in their order; a failure where a score is not a number."""
    if not all(map(math.isfinite, scores)):
        return SearchFailure(
            kind=FailureKind.INTERNAL, reason="the reranker gave a score that is not a number"
        )
    rescored = [Hit(document=hit.document, score=score) for hit, score in zip(hits, scores, strict=True)]
    return tuple(sorted(rescored, key=lambda hit: -hit.score))  # stable


def _load_cross_encoder(folder: Path, *, transformer: Path, device: str) -> CrossEncoder:
    silence_transformers()
    dtype = torch.float32 if device == "cpu" else torch.float16
    try:
        model = CrossEncoder(
            str(folder),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": dtype, "use_safetensors": True},
        )
        network = model.transformers_model
        if network is None:
            raise RetrieverError(f"reranker {folder} has no transformer, expected a cross-encoder")
        copy_weights(network)
        absent = list_absent_weights(network, folder=transformer)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, RetrieverError):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        raise RetrieverError(
            f"reranker {folder} does not load ({first_line}); expected a cross-encoder's folder or name"
        ) from error
    if absent:
        raise RetrieverError(
            f"reranker {folder} lacks the weights {absent[:3]} ({len(absent)} in all); "
            "expected a cross-encoder, not the encoder that it was made of"
        )
    if model.num_labels != 1:
        raise RetrieverError(
            f"reranker {folder} has {model.num_labels} classes, expected a model with one score "
            "(num_labels 1)"
        )
    return model

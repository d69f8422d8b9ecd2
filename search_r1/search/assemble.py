"""From settings to a retriever: the one place that knows all back ends.

Libraries are imported by the back end that needs them, when it is opened: torch and Faiss take seconds, which
neither --help nor a taken port should cost.
"""

from __future__ import annotations

import logging
import os

from search_r1.search.errors import RetrieverError
from search_r1.search.retriever import Retriever, ThreadedRetriever
from search_r1.search.settings import BM25, HYBRID, RetrieverSettings
from serving.web.loading import load_in_thread

logger = logging.getLogger(__name__)


def check_files(settings: RetrieverSettings) -> None:
    """Raise RetrieverError for a missing file, before anything is loaded."""
    _require_model(settings.reranker_model, flag="--reranker_model")
    if settings.is_online:
        return
    dense = settings.dense
    if not dense.corpus_path.is_file():
        raise RetrieverError(f"--corpus_path {dense.corpus_path} is not a file; expected JSONL or Arrow")
    fix = "build it with `index build` (see its --help)"
    if settings.name in (BM25, HYBRID) and not settings.bm25_path.is_dir():
        flag = "--index_path" if settings.name == BM25 else "--bm25_index_path"
        raise RetrieverError(f"{flag} {settings.bm25_path} is not a folder with a BM25 index; {fix}")
    if settings.name != BM25:
        if not dense.index_path.is_file():
            raise RetrieverError(f"--index_path {dense.index_path} is not a file; {fix}")
        _require_model(dense.encoder.path, flag="--retriever_model")


async def open_retriever(settings: RetrieverSettings) -> Retriever:
    """Load it, in threads. Raises RetrieverError for what is missing, malformed or does not fit."""
    check_files(settings)
    retriever = await _open_first_stage(settings)
    if not settings.reranker_model:
        return retriever
    try:
        from search_r1.search.rerank import CrossEncoderReranker, RerankedRetriever

        # In a thread that a stop signal need not wait for, like an index of gigabytes.
        model = await load_in_thread(lambda: CrossEncoderReranker(settings.reranker_model), name="reranker")
        return RerankedRetriever(retriever, model=model, depth=settings.rerank_depth)
    except BaseException:
        await retriever.aclose()
        raise


async def _open_first_stage(settings: RetrieverSettings) -> Retriever:
    if settings.is_online:
        from search_r1.search.online.retriever import open_online

        return open_online(settings.name, options=settings.online)
    if settings.online.mock:
        logger.warning(
            "mock search is for online engines only: --retriever_name %s answers from its index",
            settings.name or "of the index",
        )
    if settings.name == BM25:
        return await _open_bm25(settings)
    dense = await _open_dense(settings)
    if settings.name != HYBRID:
        return dense
    from search_r1.search.hybrid import HybridRetriever

    try:
        lexical = await _open_bm25(settings)
    except BaseException:
        await dense.aclose()
        raise
    return HybridRetriever([dense, lexical], depth=settings.hybrid_depth)


async def _open_dense(settings: RetrieverSettings) -> Retriever:
    def load() -> ThreadedRetriever:
        from search_r1.search.dense import load_dense

        dense = load_dense(settings.dense)
        return ThreadedRetriever(dense, facts=dense.facts())

    return await load_in_thread(load, name="index")


async def _open_bm25(settings: RetrieverSettings) -> Retriever:
    def load() -> ThreadedRetriever:
        from search_r1.search.bm25 import load_bm25

        dense = settings.dense
        lexical = load_bm25(
            settings.bm25_path, corpus_path=dense.corpus_path, num_threads=dense.num_threads or 1
        )
        return ThreadedRetriever(lexical, facts=lexical.facts())

    return await load_in_thread(load, name="bm25")


def _require_model(path: str, *, flag: str) -> None:
    """Raise RetrieverError for an absolute path that is not a folder; a relative one may be a hub id."""
    if path and os.path.isabs(path) and not os.path.isdir(path):
        raise RetrieverError(f"{flag} {path} is not a folder; expected a Hugging Face model")

"""From settings to a retriever: the one place that knows all back ends.

Libraries are imported by the back end that needs them, when it is opened: torch and faiss take seconds, which
neither --help nor a taken port should cost.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import cast

from search_r1.search.errors import RetrieverError
from search_r1.search.retriever import Retriever, ThreadedRetriever
from search_r1.search.settings import BM25, HYBRID, RetrieverSettings
from serving.web.loading import load_in_thread

logger = logging.getLogger(__name__)


def check_files(settings: RetrieverSettings) -> None:
    """What can be seen without loading anything. Raises RetrieverError, so that a typo costs no waiting."""
    _require_model(settings.reranker_model, flag="--reranker_model")
    if settings.is_online:
        return
    if not settings.corpus_path.is_file():
        raise RetrieverError(
            f"--corpus_path {settings.corpus_path} is not a file; expected JSONL with a passage per line, or "
            "Arrow"
        )
    fix = "build it with `bash search_r1/search/build_index.sh` (see its --help)"
    if settings.retriever_name in (BM25, HYBRID):
        flag, folder = _locate_bm25(settings)
        if not folder.is_dir():
            raise RetrieverError(f"{flag} {folder} is not a folder with a BM25 index; {fix}")
    if settings.retriever_name != BM25:
        if not settings.index_path.is_file():
            raise RetrieverError(f"--index_path {settings.index_path} is not a file; {fix}")
        _require_model(settings.retriever_model, flag="--retriever_model")


async def open_retriever(settings: RetrieverSettings) -> Retriever:
    """Load it, in threads. Raises RetrieverError for what is missing, malformed or does not fit."""
    check_files(settings)
    retriever = await _open_first_stage(settings)
    if not settings.reranker_model:
        return retriever
    try:
        from search_r1.search.rerank import RerankedRetriever, load_reranker

        device = "cuda" if settings.index_device != "cpu" else None
        # In a thread that a stop signal need not wait for: an index may have gigabytes, a model, too.
        model = await load_in_thread(
            lambda: load_reranker(settings.reranker_model, device=device), name="reranker"
        )
        return RerankedRetriever(retriever, model=model, depth=settings.rerank_depth)
    except BaseException:
        await retriever.aclose()
        raise


async def _open_first_stage(settings: RetrieverSettings) -> Retriever:
    if settings.is_online:
        from search_r1.search.online.assemble import build_online

        return build_online(settings.retriever_name, options=settings.online)
    if settings.online.mock:
        logger.warning(
            "mock search was asked for, which concerns online engines only: --retriever_name %s answers from "
            "its index",
            settings.retriever_name or "of the index",
        )
    if settings.retriever_name == BM25:
        return await _open_bm25(settings)
    if settings.retriever_name != HYBRID:
        return await _open_dense(settings, family=settings.retriever_name or None)
    from search_r1.search.hybrid import HybridRetriever

    dense = await _open_dense(settings, family=None)
    try:
        lexical = await _open_bm25(settings)
    except BaseException:
        await dense.aclose()
        raise
    return HybridRetriever([dense, lexical], depth=settings.hybrid_depth)


async def _open_dense(settings: RetrieverSettings, *, family: str | None) -> Retriever:
    def load() -> ThreadedRetriever:
        from search_r1.search.dense import load_dense
        from search_r1.search.kinds import SearchOptions
        from search_r1.search.vector_index import Device

        dense = load_dense(
            settings.index_path,
            corpus_path=settings.corpus_path,
            encoder_path=settings.retriever_model,
            retriever_name=family,
            device=cast(Device, settings.index_device),
            mmap=settings.mmap,
            search=SearchOptions(
                nprobe=settings.nprobe or None,
                ef_search=settings.ef_search or None,
                rescore_factor=settings.rescore_factor or None,
            ),
            num_threads=settings.num_threads,
            pooling=settings.encoding.pooling_method,
            query_prefix=settings.encoding.query_prefix,
            passage_prefix=settings.encoding.passage_prefix,
            max_length=settings.encoding.max_length,
        )
        return ThreadedRetriever(dense, facts=dense.facts())

    return await load_in_thread(load, name="index")


async def _open_bm25(settings: RetrieverSettings) -> Retriever:
    def load() -> ThreadedRetriever:
        from search_r1.search.bm25 import load_bm25

        _, folder = _locate_bm25(settings)
        lexical = load_bm25(folder, corpus_path=settings.corpus_path, num_threads=settings.num_threads)
        return ThreadedRetriever(lexical, facts=lexical.facts())

    return await load_in_thread(load, name="bm25")


def _locate_bm25(settings: RetrieverSettings) -> tuple[str, Path]:
    """The folder of the BM25 index, and the flag that names it."""
    if settings.retriever_name == BM25:
        return "--index_path", settings.index_path
    return "--bm25_index_path", settings.bm25_index_path


def _require_model(path: str, *, flag: str) -> None:
    """A relative path may be the name of a model in the hub's cache."""
    if path and os.path.isabs(path) and not os.path.isdir(path):
        raise RetrieverError(f"{flag} {path} is not a folder; expected a Hugging Face model")

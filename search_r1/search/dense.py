"""Exact inner-product search over unit vectors: the only file of this package that imports faiss."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import torch

from search_r1.search.corpus import Corpus, open_corpus
from search_r1.search.encoder import FloatArray, TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.manifest import IndexManifest, compare_manifests, hash_index, load_manifest
from search_r1.search.retriever import Hit

logger = logging.getLogger(__name__)

METRIC = "inner_product"
_NUM_SELF_TESTS = 8


class VectorIndex:
    """A Faiss index whose vectors are numbered as the rows of the corpus."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index

    @classmethod
    def create_flat(cls, dim: int) -> VectorIndex:
        """An empty exact index."""
        return cls(faiss.IndexFlatIP(dim))

    @classmethod
    def load(cls, path: Path, *, on_gpu: bool) -> VectorIndex:
        """Raises RetrieverError when the file is missing, unreadable or of another metric."""
        if not path.is_file():
            raise RetrieverError(f"index {path} is not a file; build it first (see build_index.sh)")
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise RetrieverError(
                f"index {path} is not a readable Faiss index ({error}); rebuild it"
            ) from error
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise RetrieverError(f"index {path} has Faiss metric {index.metric_type}, expected {METRIC}")
        return cls(_move_to_gpus(index) if on_gpu else index)

    @property
    def dim(self) -> int:
        return int(self._index.d)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors: FloatArray) -> None:
        """Append [n, dim]."""
        self._index.add(vectors)

    def search(self, vectors: FloatArray, *, topk: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """Scores and rows [n, topk], best first; row -1 where there are fewer than `topk`."""
        scores, rows = self._index.search(vectors, topk)
        return scores, rows

    def save(self, path: Path) -> None:
        """Write atomically."""
        partial = path.with_name(path.name + ".partial")
        faiss.write_index(self._index, str(partial))
        os.replace(partial, path)


class DenseRetriever:
    """Encode the queries, search the index, look the rows up in the corpus. Not thread-safe."""

    def __init__(self, index: VectorIndex, *, corpus: Corpus, encoder: TextEncoder) -> None:
        self._index = index
        self._corpus = corpus
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._corpus)

    def search(self, queries: Sequence[str], *, topk: int) -> list[list[Hit]]:
        """A blank query finds nothing."""
        asked = [row for row, query in enumerate(queries) if query.strip()]
        found: list[list[Hit]] = [[] for _ in queries]
        if asked:
            vectors = self._encoder.encode_queries([queries[row] for row in asked])
            for row, hits in zip(asked, self._look_up(vectors, topk=topk), strict=True):
                found[row] = hits
        return found

    def check(self) -> None:
        """Some known passages must find themselves: raises RetrieverError when most do not."""
        stride = max(1, len(self._corpus) // _NUM_SELF_TESTS)
        known = [self._corpus[row] for row in range(0, len(self._corpus), stride)][:_NUM_SELF_TESTS]
        vectors = self._encoder.encode_passages([document.contents for document in known])
        hits = self._look_up(vectors, topk=1)
        lost = [
            document.id
            for document, best in zip(known, hits, strict=True)
            if not best or best[0].document.contents != document.contents
        ]
        message = f"{len(lost)} of {len(known)} known passages do not find themselves (ids {lost})"
        if 2 * len(lost) > len(known):
            raise RetrieverError(f"{message}: the index was made by another encoder or from another corpus")
        if lost:
            logger.warning("%s: expected of an approximate index only", message)

    def _look_up(self, vectors: FloatArray, *, topk: int) -> list[list[Hit]]:
        scores, rows = self._index.search(vectors, topk=min(topk, len(self._index)))
        return [
            [
                Hit(document=self._corpus[int(row)], score=float(score))
                for row, score in zip(query_rows, query_scores, strict=True)
                if row >= 0
            ]
            for query_rows, query_scores in zip(rows, scores, strict=True)
        ]


def describe_index(
    index: VectorIndex, *, index_sha256: str, corpus: Corpus, encoder: TextEncoder, retriever_name: str
) -> IndexManifest:
    """The manifest of what is at hand; `index_sha256` is the hash of the index's file."""
    return IndexManifest(
        retriever_name=retriever_name,
        encoder_sha256=encoder.sha256,
        pooling=encoder.recipe.pooling,
        query_prefix=encoder.recipe.query_prefix,
        passage_prefix=encoder.recipe.passage_prefix,
        max_length=encoder.recipe.max_length,
        normalised=encoder.recipe.normalised,
        metric=METRIC,
        dim=index.dim,
        index_sha256=index_sha256,
        corpus_sha256=corpus.sha256,
        count=len(corpus),
        faiss_version=faiss.__version__,
    )


def load_dense(
    index_path: Path,
    *,
    corpus_path: Path,
    encoder_path: str,
    retriever_name: str,
    on_gpu: bool = False,
    num_threads: int | None = None,
) -> DenseRetriever:
    """Load all three parts; raises RetrieverError unless they are whole and belong together.

    The manifest vouches for every line of the corpus; without one each is parsed here, so that a malformed
    one is met now and not by a query later. `num_threads`: of the whole process, for encoding and for
    search; None leaves it as it is.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
        faiss.omp_set_num_threads(num_threads)
    rebuild = (
        f"python -m search_r1.search.index_builder --retrieval_method {retriever_name}"
        f" --model_path {encoder_path} --corpus_path {corpus_path} --index_path {index_path}"
    )
    corpus = open_corpus(corpus_path)
    recorded = load_manifest(index_path)
    if recorded is not None:
        _check_index_file(index_path, recorded=recorded, rebuild=rebuild)
    index = VectorIndex.load(index_path, on_gpu=on_gpu)
    encoder = TextEncoder(encoder_path, retriever_name=retriever_name)
    problems = _list_misfits(
        index, recorded=recorded, corpus=corpus, encoder=encoder, retriever_name=retriever_name
    )
    if problems:
        raise RetrieverError(
            f"index {index_path} does not belong to corpus {corpus_path} and encoder {encoder_path}:\n  "
            + "\n  ".join(problems)
            + f"\nname the files that belong together, or rebuild the index: {rebuild}"
        )
    if recorded is None:
        logger.warning(
            "index %s has no manifest: only its count, its dimension and some passages are checked; "
            "parsing all %d lines of the corpus, which takes a while if there are millions",
            index_path,
            len(corpus),
        )
        corpus.check()
    retriever = DenseRetriever(index, corpus=corpus, encoder=encoder)
    retriever.check()
    return retriever


def _check_index_file(index_path: Path, *, recorded: IndexManifest, rebuild: str) -> None:
    """Before Faiss reads the file: damaged vectors look like any others, a damaged header may crash it."""
    if not index_path.is_file():
        return  # reported as missing, by the loading itself
    found = hash_index(index_path)
    if found != recorded.index_sha256:
        raise RetrieverError(
            f"index {index_path} is damaged or not the one its manifest is about: its SHA-256 is {found}, "
            f"the manifest says {recorded.index_sha256}; copy both again, or rebuild the index: {rebuild}"
        )


def _list_misfits(
    index: VectorIndex,
    *,
    recorded: IndexManifest | None,
    corpus: Corpus,
    encoder: TextEncoder,
    retriever_name: str,
) -> list[str]:
    """One line for every fact that the three parts do not agree on."""
    problems = []
    if recorded is not None:
        actual = describe_index(
            index,
            index_sha256=recorded.index_sha256,  # checked before the index was read
            corpus=corpus,
            encoder=encoder,
            retriever_name=retriever_name,
        )
        problems += compare_manifests(recorded, actual=actual)
    if len(index) != len(corpus):
        problems.append(f"count: the index holds {len(index)} vectors, the corpus {len(corpus)} passages")
    if index.dim != encoder.dim:
        problems.append(f"dim: the index holds vectors of {index.dim}, the encoder makes {encoder.dim}")
    return problems


def _move_to_gpus(index: faiss.Index) -> faiss.Index:
    if faiss.get_num_gpus() == 0:
        raise RetrieverError(
            "--faiss_gpu: this Faiss build sees no GPU; install a GPU build of Faiss or leave the flag out"
        )
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, co=options)

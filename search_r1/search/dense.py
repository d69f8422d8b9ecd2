"""Dense search: encode the queries, search the vectors, look the rows up in the corpus."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from search_r1.search.agreement import Trial, choose_recipe, list_misfits, prepare_trial, run_trial
from search_r1.search.corpus import Corpus, open_corpus
from search_r1.search.encoder import TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import SearchOptions
from search_r1.search.manifest import IndexManifest, list_changed_files, load_manifest
from search_r1.search.ranking import FloatArray
from search_r1.search.retriever import Hit
from search_r1.search.vector_index import (
    Device,
    VectorIndex,
    locate_vectors,
    open_index,
    set_num_threads,
)
from search_r1.search.watched_file import WatchedFile
from serving.files import sha256_of_file

logger = logging.getLogger(__name__)

Facts = dict[str, str | int | float | None]


class DenseRetriever:
    """A `BatchSearch`. Not thread-safe."""

    def __init__(
        self,
        index: VectorIndex,
        *,
        corpus: Corpus,
        encoder: TextEncoder,
        files: Sequence[WatchedFile],
        facts: Mapping[str, str | int | float | None],
    ) -> None:
        """The three must belong together: `load_dense` sees to it. `facts` is what `facts()` returns.

        `files`: of the index; none of them may change while it is searched.
        """
        self._index = index
        self._files = files
        self._corpus = corpus
        self._encoder = encoder
        self._facts = dict(facts)

    def __len__(self) -> int:
        return len(self._corpus)

    def search(self, queries: Sequence[str], *, topk: int) -> list[list[Hit]]:
        """A blank query finds nothing. Raises ChangedFileError."""
        asked = [row for row, query in enumerate(queries) if query.strip()]
        found: list[list[Hit]] = [[] for _ in queries]
        if asked:
            vectors = self._encoder.encode_queries([queries[row] for row in asked])
            for row, hits in zip(asked, self._look_up(vectors, topk=topk), strict=True):
                found[row] = hits
        return found

    def facts(self) -> Facts:
        """What its answers depend on."""
        return dict(self._facts)

    def close(self) -> None:
        """Release the corpus; the vectors go with the object."""
        self._corpus.close()
        for file in self._files:
            file.close()

    def _check_files(self) -> None:
        for file in self._files:
            file.check()

    def _look_up(self, vectors: FloatArray, *, topk: int) -> list[list[Hit]]:
        self._check_files()  # a mapped file that was cut short must not be looked at
        scores, rows = self._index.search(vectors, topk=min(topk, len(self._index)))
        self._check_files()  # nor may what was found while it was rewritten be believed
        return [
            [
                Hit(document=self._corpus[int(row)], score=float(score))
                for row, score in zip(query_rows, query_scores, strict=True)
                if row >= 0
            ]
            for query_rows, query_scores in zip(rows, scores, strict=True)
        ]


def load_dense(
    index_path: Path,
    *,
    corpus_path: Path,
    encoder_path: str | Path,
    retriever_name: str | None = None,
    device: Device = "cpu",
    mmap: bool = True,
    search: SearchOptions | None = None,
    num_threads: int | None = None,
    max_length: int | None = None,
    pooling: str | None = None,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    use_fp16: bool | None = None,
    encoder_device: str | None = None,
    full_check: bool = False,
) -> DenseRetriever:
    """Open all three parts; raises RetrieverError unless they are whole and belong together.

    Files are told by their fingerprints, so that a start does not read gigabytes; `full_check` reads them
    all. Without a manifest count, dimension and the trial decide, and all of the corpus is parsed, once.
    `pooling`, `max_length`, prefixes None: what the manifest says. `retriever_name` None: the manifest's
    prefixes; a name whose prefixes are others is refused. `device` is where the vectors are searched.
    `num_threads`: of the whole process, for encoding and for search; None leaves it as it is.
    """
    if num_threads is not None:
        set_num_threads(num_threads)
    recorded = load_manifest(index_path)
    rebuild = write_command(index_path, corpus_path, encoder_path, recorded, retriever_name)
    if recorded is not None and index_path.is_file():
        _check_files(recorded, index_path=index_path, full=full_check, rebuild=rebuild)
    files = [WatchedFile(path) for path in (index_path, locate_vectors(index_path)) if path.is_file()]
    corpus = open_corpus(corpus_path)
    index = open_index(index_path, mmap=mmap, device=device, search=search or SearchOptions())
    encoder = TextEncoder(
        encoder_path,
        retriever_name=retriever_name,
        device=encoder_device,
        use_fp16=use_fp16,
        **choose_recipe(
            recorded,
            retriever_name=retriever_name,
            told={
                "pooling": pooling,
                "max_length": max_length,
                "query_prefix": query_prefix,
                "passage_prefix": passage_prefix,
            },
        ),
    )
    problems = list_misfits(recorded, index=index, corpus=corpus, encoder=encoder, full=full_check)
    if problems:
        raise RetrieverError(
            f"index {index_path} does not belong to corpus {corpus_path} and encoder {encoder_path}:\n  "
            + "\n  ".join(problems)
            + f"\nname the files that belong together, or rebuild the index: {rebuild}"
        )
    if recorded is None:
        _check_unrecorded(corpus, index_path=index_path)
    trial: Trial = prepare_trial(corpus, encoder)
    run_trial(
        trial,
        index=index,
        corpus=corpus,
        needed=f"name the files that belong together, or rebuild: {rebuild}",
    )
    facts = describe_dense(index, corpus=corpus, encoder=encoder, recorded=recorded)
    facts["index_device"] = device
    return DenseRetriever(index, corpus=corpus, encoder=encoder, files=files, facts=facts)


def describe_dense(
    index: VectorIndex, *, corpus: Corpus, encoder: TextEncoder, recorded: IndexManifest | None
) -> Facts:
    """What the answers of the three depend on."""
    return {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        **asdict(encoder.recipe),
        "corpus_fingerprint": corpus.fingerprint,
        "corpus_sha256": recorded.corpus.sha256 if recorded else None,
        "count": len(corpus),
        **{f"index_{name}": value for name, value in index.describe().items()},
    }


def write_command(
    index_path: Path,
    corpus_path: Path,
    encoder_path: str | Path,
    recorded: IndexManifest | None,
    retriever_name: str | None,
) -> str:
    """The command that builds this index again."""
    name = retriever_name or (recorded.retriever_name if recorded else None)
    method = f" --retrieval_method {name}" if name else ""
    kind = f" --kind {recorded.kind}" if recorded and recorded.kind != "flat" else ""
    return (
        f"python -m search_r1.search.index_builder{method} --model_path {encoder_path}"
        f" --corpus_path {corpus_path} --index_path {index_path}{kind}"
    )


def _check_files(recorded: IndexManifest, *, index_path: Path, full: bool, rebuild: str) -> None:
    """Before anything reads them: damaged vectors look like any others, a damaged header may crash Faiss."""
    problems = list_changed_files(recorded, index_path)
    if full and not problems:
        problems = [
            f"files.{name}.sha256: index was built with {facts.sha256}, found {found}"
            for name, facts in recorded.files.items()
            if (found := sha256_of_file(index_path.with_name(name))) != facts.sha256
        ]
    if problems:
        raise RetrieverError(
            f"index {index_path} is damaged or not the one its manifest is about:\n  "
            + "\n  ".join(problems)
            + f"\ncopy all its files again, or rebuild it: {rebuild}"
        )


def _check_unrecorded(corpus: Corpus, *, index_path: Path) -> None:
    logger.warning(
        "index %s has no manifest: only its count, its dimension and some passages are checked; "
        "the first time all %d passages of the corpus are parsed, which takes a while if there are millions",
        index_path,
        len(corpus),
    )
    corpus.check(lambda done, total: logger.info("checked %d of %d passages", done, total))

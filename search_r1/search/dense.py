"""Dense search: encode the queries, search the vectors, look the rows up in the corpus."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from search_r1.search.agreement import complete_spec, list_misfits, prepare_trial, run_trial
from search_r1.search.corpus import Corpus, open_corpus
from search_r1.search.encoder import TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.files import WatchedFile, list_changed_files
from search_r1.search.manifest import IndexManifest, load_manifest
from search_r1.search.ranking import FloatArray
from search_r1.search.retriever import Hit
from search_r1.search.settings import DenseOptions
from search_r1.search.vector_index import VectorIndex, open_index, set_num_threads

logger = logging.getLogger(__name__)

Facts = dict[str, str | int | float | None]


class DenseRetriever:
    """A `BatchSearch` over an index, a corpus and an encoder that belong together. Not thread-safe."""

    def __init__(
        self,
        index: VectorIndex,
        *,
        corpus: Corpus,
        encoder: TextEncoder,
        file: WatchedFile,
        facts: Mapping[str, str | int | float | None],
    ) -> None:
        """Take `file`, the index, which must not change while it is searched; `facts` go to `/version`."""
        self._index = index
        self._file = file
        self._corpus = corpus
        self._encoder = encoder
        self._facts = dict(facts)

    def __len__(self) -> int:
        return len(self._corpus)

    def search(self, queries: Sequence[str], *, topk: int) -> list[list[Hit]]:
        """Return one list per query; a blank one finds nothing. Raises ChangedFileError."""
        asked = [row for row, query in enumerate(queries) if query.strip()]
        found: list[list[Hit]] = [[] for _ in queries]
        if asked:
            vectors = self._encoder.encode_queries([queries[row] for row in asked])
            for row, hits in zip(asked, self._look_up(vectors, topk=topk), strict=True):
                found[row] = hits
        return found

    def facts(self) -> Facts:
        """Return what the answers depend on."""
        return dict(self._facts)

    def close(self) -> None:
        """Close corpus and file; the vectors are released with the object."""
        self._corpus.close()
        self._file.close()

    def _look_up(self, vectors: FloatArray, *, topk: int) -> list[list[Hit]]:
        self._file.check()  # reading a mapped file that was truncated kills the process
        scores, rows = self._index.search(vectors, topk=min(topk, len(self._index)))
        self._file.check()  # results found while it was rewritten are not to be trusted
        return [
            [
                Hit(document=self._corpus[int(row)], score=float(score))
                for row, score in zip(query_rows, query_scores, strict=True)
                if row >= 0
            ]
            for query_rows, query_scores in zip(rows, scores, strict=True)
        ]


def load_dense(options: DenseOptions, *, encoder_device: str | None = None) -> DenseRetriever:
    """Open index, corpus and encoder. Raises RetrieverError unless they are whole and belong together.

    Files are compared by fingerprint, so that a start does not read gigabytes. Without a manifest count,
    dimension and the trial decide, and all of the corpus is parsed, once.
    """
    index_path, corpus_path = options.index_path, options.corpus_path
    if options.num_threads is not None:
        set_num_threads(options.num_threads)
    recorded = load_manifest(index_path)
    rebuild = f"rebuild the index: {_build_command(options, recorded)}"
    if recorded is not None and index_path.is_file():
        _check_file(recorded, index_path=index_path, fix=rebuild)
    index = open_index(index_path, mmap=options.mmap, device=options.device, search=options.search)
    corpus = open_corpus(corpus_path)
    encoder = TextEncoder(complete_spec(options.encoder, recorded), device=encoder_device)
    fix = f"name the files that belong together, or {rebuild}"
    problems = list_misfits(recorded, index=index, corpus=corpus, encoder=encoder)
    if problems:
        raise RetrieverError(
            f"index {index_path} does not belong to corpus {corpus_path} and encoder {options.encoder.path}:"
            "\n  " + "\n  ".join(problems) + f"\n{fix}"
        )
    if recorded is None:
        logger.warning(
            "index %s has no manifest: only its count, its dimension and some passages are checked; "
            "the first time all %d passages of the corpus are parsed, which takes minutes for millions",
            index_path,
            len(corpus),
        )
        corpus.check(lambda done, total: logger.info("checked %d of %d passages", done, total))
    run_trial(prepare_trial(corpus, encoder), index=index, corpus=corpus, fix=fix)
    facts: Facts = {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        **asdict(encoder.recipe),
        "corpus_fingerprint": corpus.fingerprint,
        "corpus_sha256": recorded.corpus.sha256 if recorded else None,
        "count": len(corpus),
        **{f"index_{name}": value for name, value in index.describe().items()},
        "index_device": options.device,
    }
    return DenseRetriever(index, corpus=corpus, encoder=encoder, file=WatchedFile(index_path), facts=facts)


def _build_command(options: DenseOptions, recorded: IndexManifest | None) -> str:
    """Return the command that builds this index again."""
    family = options.encoder.family or (recorded.retriever_name if recorded else None)
    method = f" --retrieval_method {family}" if family else ""
    kind = f" --kind {recorded.kind}" if recorded and recorded.kind != "flat" else ""
    return (
        f"index build{method} --model_path {options.encoder.path} --corpus_path {options.corpus_path}"
        f" --index_path {options.index_path}{kind}"
    )


def _check_file(recorded: IndexManifest, *, index_path: Path, fix: str) -> None:
    """Compare the file before it is read: a damaged header may crash Faiss."""
    if set(recorded.files) != {index_path.name}:
        raise RetrieverError(
            f"the manifest of index {index_path} names the files {sorted(recorded.files)}, expected only "
            f"{index_path.name}; give it its name again, or {fix}"
        )
    if problems := list_changed_files(recorded.files, index_path.parent):
        raise RetrieverError(
            f"index {index_path} is damaged or not the one of its manifest:\n  "
            + "\n  ".join(problems)
            + f"\ncopy it again, or {fix}"
        )

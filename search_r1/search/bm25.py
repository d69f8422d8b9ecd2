"""Lexical search: BM25 over a tantivy index in a folder, the only file that imports tantivy.

    build_bm25(Path("wiki-18.jsonl"), index_path=Path("index/bm25"))
    search = load_bm25(Path("index/bm25"), corpus_path=Path("wiki-18.jsonl"))

The index holds terms and row numbers; the passages stay in the corpus. It is memory-mapped. A build writes
the next folder `terms-N` and then the manifest that names it, at once: after a kill the old index stands.
"""

from __future__ import annotations

import logging
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tantivy

from search_r1.search.corpus import Corpus, compare_corpus, open_corpus, sample_rows
from search_r1.search.errors import RetrieverError
from search_r1.search.files import WatchedFile, compare_facts, describe_file, list_changed_files
from search_r1.search.manifest import (
    BM25_LANGUAGES,
    Bm25Manifest,
    load_bm25_manifest,
    locate_bm25_manifest,
    save_manifest,
)
from search_r1.search.retriever import Hit
from serving.encoding import replace_surrogates
from serving.files import lock_file

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
"""`report(phase, done, total)`"""

MAX_QUERY_TERMS = 512
"""Distinct terms of a query that are looked up, the first ones: the lexical `max_length`."""
_HEAP_BYTES = 256 << 20
"""Of the terms that are collected before they go to disk."""
_MAX_TIED = 1 << 17
"""Equal scores that are put in order; of more than so many, tantivy chooses."""
_NUM_SELF_TESTS = 10
_SELF_TEST_DEPTH = 10
_PASSAGES_PER_REPORT = 1000
_K1, _B = 1.2, 0.75
"""Tantivy's own."""
_ANALYSIS = 1
"""Grows when the same text gives other terms."""
# A run of letters, digits and marks is a term; a script that is written without spaces has one per character.
_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\x{30FC}"
_TERM = rf"[{_NO_SPACES}]|[\p{{L}}\p{{N}}\p{{M}}&&[^{_NO_SPACES}]]+"
_MAX_TERM_BYTES = 255
_FOLDER = "terms-"
_LOCK_FILE = "lock"


class Bm25Retriever:
    """Scores passages by the terms they share with the query; equal scores are ordered by row."""

    def __init__(
        self,
        index: tantivy.Index,
        *,
        corpus: Corpus,
        manifest: Bm25Manifest,
        files: Sequence[WatchedFile],
        num_threads: int,
    ) -> None:
        """Search the index in `files`; none of them may change while it is searched."""
        index.config_reader(reload_policy="manual")  # no thread that watches the folder
        index.reload()
        self._schema = index.schema
        self._searcher = index.searcher()
        self._analyzer = _build_analyzer(manifest.language)
        self._corpus = corpus
        self._manifest = manifest
        self._files = files
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="bm25")

    def __len__(self) -> int:
        return len(self._corpus)

    def facts(self) -> Mapping[str, str | int | float | None]:
        """Return what the answers depend on."""
        return {
            "retriever": "bm25",
            "language": self._manifest.language,
            "k1": self._manifest.k1,
            "b": self._manifest.b,
            "passages": self._manifest.count,
            "corpus_sha256": self._manifest.corpus.sha256,
        }

    def search(self, queries: Sequence[str], *, topk: int) -> list[list[Hit]]:
        """Return one list per query; one without a term finds nothing. Raises ChangedFileError."""
        self._check_files()
        found = list(self._threads.map(lambda query: self._search_one(query, topk=topk), queries))
        self._check_files()
        return found

    def check(self) -> None:
        """Raise RetrieverError when most of ten known passages do not find themselves."""
        sample = [self._corpus[row] for row in sample_rows(len(self._corpus), size=_NUM_SELF_TESTS)]
        known = [document for document in sample if self._list_terms(document.contents)]
        found = self.search([document.contents for document in known], topk=_SELF_TEST_DEPTH)
        lost = [
            document.id
            for document, hits in zip(known, found, strict=True)
            if document.contents not in [hit.document.contents for hit in hits]
        ]
        message = f"{len(lost)} of {len(known)} known passages do not find themselves (ids {lost})"
        if 2 * len(lost) > len(known):
            raise RetrieverError(f"{message}: the BM25 index was made of another corpus; rebuild it")
        if lost:
            logger.warning("%s: others match their words better", message)

    def close(self) -> None:
        """Release threads and files."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._corpus.close()
        for file in self._files:
            file.close()
        del self._searcher

    def _check_files(self) -> None:
        for file in self._files:
            file.check()

    def _list_terms(self, text: str) -> list[str]:
        return self._analyzer.analyze(_clean(text))

    def _search_one(self, text: str, *, topk: int) -> list[Hit]:
        # Each term is looked up as it is, so that nothing in a query is query syntax.
        counts = Counter(self._list_terms(text))
        if not counts:
            return []
        clauses = [self._weigh(term, count) for term, count in counts.items()][:MAX_QUERY_TERMS]
        ranked = self._rank(tantivy.Query.boolean_query(clauses), topk=topk)
        return [Hit(document=self._corpus[row], score=score) for score, row in ranked]

    def _weigh(self, term: str, count: int) -> tuple[tantivy.Occur, tantivy.Query]:
        query = tantivy.Query.term_query(self._schema, "contents", term, index_option="freq")
        if count > 1:
            query = tantivy.Query.boost_query(query, float(count))
        return tantivy.Occur.Should, query

    def _rank(self, query: tantivy.Query, *, topk: int) -> list[tuple[float, int]]:
        """Return the `topk` best pairs of score and row.

        Tantivy orders equal scores by where it stored the passages. So the limit grows until all that are
        equal to the last one are seen, and these are ordered here.
        """
        most = min(len(self._corpus), max(_MAX_TIED, topk))
        limit = min(topk + 1, most)
        while True:
            hits = self._searcher.search(query, limit=limit, count=False).hits
            is_tied = len(hits) == limit and hits[-1][0] == hits[min(topk, limit) - 1][0]
            if limit == most or not is_tied:
                break
            limit = min(8 * limit, most)
        rows = self._searcher.fast_field_values("row", [address for _, address in hits])
        pairs = ((float(score), int(row)) for (score, _), row in zip(hits, rows, strict=True))
        return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:topk]


def build_bm25(
    corpus_path: Path | str,
    *,
    index_path: Path | str,
    language: str = "english",
    report: Report | None = None,
) -> Bm25Manifest:
    """Write the folder `index_path`, replacing an older BM25 index. Raises RetrieverError for bad input."""
    if language not in BM25_LANGUAGES:
        raise RetrieverError(f"BM25 language {language!r} is unknown; expected one of {BM25_LANGUAGES}")
    corpus_path, index_path = Path(corpus_path), Path(index_path)
    _require_own_folder(index_path)
    lock = index_path / _LOCK_FILE
    taken = RetrieverError(f"another builder is at work on {index_path}; let it end or stop it")
    try:
        with lock_file(lock, taken=taken):
            try:
                return _build(corpus_path, index_path=index_path, language=language, report=report)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise RetrieverError(f"BM25 index {index_path} cannot be written: {error}") from error


def _build(corpus_path: Path, *, index_path: Path, language: str, report: Report | None) -> Bm25Manifest:
    corpus = open_corpus(corpus_path)
    folder = _make_folder(index_path)
    try:
        index = tantivy.Index(_build_schema(), path=str(folder))
        index.register_tokenizer("terms", _build_analyzer(language))
        writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        _write_passages(writer, corpus=corpus, report=report or (lambda *_: None))
        manifest = _describe(folder, corpus=corpus, language=language)
        save_manifest(manifest, locate_bm25_manifest(index_path))
    except (OSError, ValueError) as error:  # ValueError: also of tantivy, when a write failed
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, RetrieverError):
            raise
        raise RetrieverError(f"BM25 index {index_path} cannot be written: {error}") from error
    finally:
        corpus.close()
    _remove_folders(index_path, keep=folder)
    return manifest


def load_bm25(
    index_path: Path | str, *, corpus_path: Path | str, num_threads: int = 1, full_check: bool = False
) -> Bm25Retriever:
    """Open an index. Raises RetrieverError unless it is whole and belongs to the corpus.

    `num_threads` queries are searched at once. `full_check` reads every byte of corpus and index.
    """
    index_path, corpus_path = Path(index_path), Path(corpus_path)
    rebuild = f"index build --retrieval_method bm25 --corpus_path {corpus_path} --index_path {index_path}"
    manifest = load_bm25_manifest(index_path, rebuild=rebuild)
    folder = index_path / manifest.folder
    if problems := list_changed_files(manifest.files, folder, full=full_check):
        shown = "\n  ".join(problems)
        raise RetrieverError(
            f"BM25 index {index_path} is damaged:\n  {shown}\ncopy it again, or rebuild it: {rebuild}"
        )
    corpus = open_corpus(corpus_path)
    try:
        if problems := _list_misfits(manifest, corpus=corpus, full_check=full_check):
            shown = "\n  ".join(problems)
            raise RetrieverError(
                f"BM25 index {index_path} does not belong to corpus {corpus_path}:\n  {shown}\n"
                f"name the files that belong together, or rebuild the index: {rebuild}"
            )
        index = _open(folder, manifest=manifest, rebuild=rebuild)
    except RetrieverError:
        corpus.close()
        raise
    files = [WatchedFile(folder / name) for name in manifest.files]
    retriever = Bm25Retriever(index, corpus=corpus, manifest=manifest, files=files, num_threads=num_threads)
    try:
        retriever.check()
    except RetrieverError:
        retriever.close()
        raise
    return retriever


def _open(folder: Path, *, manifest: Bm25Manifest, rebuild: str) -> tantivy.Index:
    try:
        return tantivy.Index.open(str(folder))
    except ValueError as error:
        raise RetrieverError(
            f"BM25 index {folder.parent}, written by tantivy {manifest.tantivy_version}, cannot be read "
            f"by tantivy {tantivy.__version__} ({error}); rebuild it: {rebuild}"
        ) from error


def _describe(folder: Path, *, corpus: Corpus, language: str) -> Bm25Manifest:
    """Return the manifest of what was just written; reads all of corpus and index."""
    written = (path for path in sorted(folder.iterdir()) if not path.name.endswith(".lock"))
    return Bm25Manifest(
        language=language,  # type: ignore[arg-type]
        analysis=_ANALYSIS,
        k1=_K1,
        b=_B,
        corpus=corpus.facts,
        count=len(corpus),
        folder=folder.name,
        files={path.name: describe_file(path) for path in written},
        tantivy_version=tantivy.__version__,
    )


def _list_misfits(recorded: Bm25Manifest, *, corpus: Corpus, full_check: bool) -> list[str]:
    """Return one line for every fact on which index, corpus and this program do not agree."""
    pairs = [("analysis", recorded.analysis, _ANALYSIS), ("k1", recorded.k1, _K1), ("b", recorded.b, _B)]
    pairs.append(("count", recorded.count, len(corpus)))
    return compare_facts(pairs) + compare_corpus(recorded.corpus, corpus=corpus, full=full_check)


def _require_own_folder(index_path: Path) -> None:
    """Raise RetrieverError where other files would be replaced."""
    if locate_bm25_manifest(index_path).is_file() or not index_path.exists():
        return
    if index_path.is_file() or any(
        not path.name.startswith(_FOLDER) and path.name != _LOCK_FILE for path in index_path.iterdir()
    ):
        raise RetrieverError(
            f"{index_path} is not a BM25 index, so it is not replaced; remove it or name another folder"
        )


def _make_folder(index_path: Path) -> Path:
    """Return the next folder, after removing what a killed build left."""
    current = None
    if locate_bm25_manifest(index_path).is_file():
        current = index_path / load_bm25_manifest(index_path, rebuild="remove the folder first").folder
    _remove_folders(index_path, keep=current)
    number = 1 if current is None else int(current.name.removeprefix(_FOLDER)) + 1
    folder = index_path / f"{_FOLDER}{number}"
    folder.mkdir(parents=True)
    return folder


def _remove_folders(index_path: Path, *, keep: Path | None) -> None:
    for folder in index_path.glob(f"{_FOLDER}*"):
        if folder != keep:
            shutil.rmtree(folder)


def _build_schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("contents", tokenizer_name="terms", index_option="freq")
    builder.add_unsigned_field("row", fast=True)
    return builder.build()


def _build_analyzer(language: str) -> tantivy.TextAnalyzer:
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.regex(_TERM))
    filters = [
        tantivy.Filter.remove_long(_MAX_TERM_BYTES),
        tantivy.Filter.lowercase(),
        tantivy.Filter.ascii_fold(),
    ]
    if language != "none":
        filters.append(tantivy.Filter.stemmer(language))
    for step in filters:
        builder = builder.filter(step)
    return builder.build()


def _clean(text: str) -> str:
    """Return one spelling of every character: composed, of normal width; lone surrogates are replaced."""
    return replace_surrogates(unicodedata.normalize("NFKC", text))


def _write_passages(writer: tantivy.IndexWriter, *, corpus: Corpus, report: Report) -> None:
    total = len(corpus)
    try:
        for row in range(total):
            passage = tantivy.Document()
            passage.add_text("contents", _clean(corpus[row].contents))
            passage.add_unsigned("row", row)
            writer.add_document(passage)
            if (row + 1) % _PASSAGES_PER_REPORT == 0:
                report("index passages", row + 1, total)
        writer.commit()
    finally:
        writer.wait_merging_threads()  # after this none of them writes into the folder
    report("index passages", total, total)

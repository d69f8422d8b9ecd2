"""The steps of a build: vectors, index, trial, publishing, recall.

All work is in `<index>.building` until the index is whole: a build that was killed continues there, and an
older index stays in its place, with its manifest, until the new one replaces it.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from search_r1.search.agreement import Trial, compare_encoder, prepare_trial, run_trial
from search_r1.search.corpus import Corpus, compare_corpus, open_corpus, sample_rows
from search_r1.search.encoder import TextEncoder, find_device
from search_r1.search.encoding_run import (
    CHUNK_SIZE,
    VECTORS_FILE,
    EncodingJob,
    EncodingRun,
    VectorFile,
    encode_here,
    encode_in_processes,
    holds_unfinished,
)
from search_r1.search.errors import RetrieverError
from search_r1.search.faiss_index import FAISS_VERSION, StoredVectors, write_index
from search_r1.search.files import describe_file
from search_r1.search.kinds import SCANNED_KINDS, IndexKind, IndexOptions
from search_r1.search.manifest import IndexManifest, load_manifest, locate_manifest, save_manifest
from search_r1.search.plan import estimate
from search_r1.search.ranking import FloatArray, VectorSource, compare_rows
from search_r1.search.recipes import EncoderSpec
from search_r1.search.vector_index import open_index, search_source
from serving.files import lock_file
from serving.web.version import package_version

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[[str, int, int], None]

_FLOAT_BYTES = 4
_MIN_COSINE = 0.98
"""Of a stored vector, perhaps quantized or made in fp16, and the same passage encoded now."""
_NUM_RECALL_QUERIES = 200
_RECALL_AT = (1, 3, 10)
_LOCK_FILE = "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """One build."""

    corpus_path: Path
    index_path: Path
    encoder: EncoderSpec
    index: IndexOptions = field(default_factory=IndexOptions)
    batch_size: int = 256
    devices: tuple[str | None, ...] = ()
    """One encoding process each, a single one encodes in this process; empty: every GPU, else the CPU."""
    num_threads: int | None = None
    """Of each encoding process, and of writing the index."""
    from_index: Path | None = None
    """A flat, fp16 or sq8 index of the same corpus and encoder, or raw float32 rows, instead of encoding."""
    keep_vectors: Path | None = None
    """Where the encoded rows are kept."""
    restart: bool = False
    """Discard unfinished work."""
    chunk_size: int = CHUNK_SIZE

    @property
    def folder(self) -> Path:
        """Return the folder of the unfinished work."""
        return self.index_path.with_name(self.index_path.name + ".building")


def build_index(options: BuildOptions, *, report: Report | None = None) -> IndexManifest:
    """Write an index and its manifest, replacing older ones; `report(phase, done, total)`.

    Raises RetrieverError for bad input.
    """
    folder = options.folder
    taken = RetrieverError(f"another builder is at work in {folder}; let it end or stop it")
    with lock_file(folder / _LOCK_FILE, taken=taken):
        try:
            manifest = _build(options, report or (lambda *_: None))
        except BaseException:
            if not holds_unfinished(folder):
                _remove(folder)
            raise
        _remove(folder)
    return manifest


def _remove(folder: Path) -> None:
    """Remove the work, its lock last: until then no other builder can begin here."""
    for path in folder.iterdir():
        if path.name != _LOCK_FILE:
            path.unlink()
    (folder / _LOCK_FILE).unlink()
    with suppress(OSError):  # not empty: another builder has begun
        folder.rmdir()


def _build(options: BuildOptions, report: Report) -> IndexManifest:
    state = _identify(options.corpus_path)
    corpus = open_corpus(options.corpus_path, report=partial(report, "find lines"))
    corpus.check(partial(report, "check passages"))
    devices = options.devices or _list_gpus() or (None,)
    for device in devices:
        find_device(device)
    encoder = TextEncoder(options.encoder, device=devices[0] if len(devices) == 1 else "cpu")
    options = replace(options, devices=devices, index=options.index.resolve(len(corpus), encoder.dim))
    trial = prepare_trial(corpus, encoder)
    # What recall is measured with: first sentences of passages all over the corpus.
    rows = sample_rows(len(corpus), size=_NUM_RECALL_QUERIES)
    queries = encoder.encode_queries([take_query(corpus[row].contents) for row in rows])
    vectors = _get_vectors(options, corpus=corpus, encoder=encoder, trial=trial, report=report)
    if _identify(options.corpus_path) != state:
        raise RetrieverError(
            f"corpus {options.corpus_path} was written to while it was encoded; start again with --restart"
        )
    manifest = _describe(options, corpus=corpus, encoder=encoder)
    del encoder  # its weights and the index need not be in memory together
    gc.collect()
    manifest = _write(options, manifest, vectors=vectors, corpus=corpus, trial=trial, report=report)
    _log_recall(options, vectors=vectors, queries=queries, report=report)
    if options.keep_vectors is not None and options.from_index is None:
        shutil.move(options.folder / VECTORS_FILE, options.keep_vectors)
    corpus.close()
    return manifest


def _list_gpus() -> tuple[str, ...]:
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


def _identify(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when the file is written or replaced."""
    if not path.is_file():
        return None
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _get_vectors(
    options: BuildOptions, *, corpus: Corpus, encoder: TextEncoder, trial: Trial, report: Report
) -> VectorSource:
    """Return all rows, encoded now or earlier."""
    count, dim = len(corpus), encoder.dim
    if options.from_index is not None:
        if options.from_index.resolve() == options.index_path.resolve():
            raise RetrieverError(
                f"--from_index {options.from_index} is the index to be written; name another --index_path"
            )
        if holds_unfinished(options.folder) and not options.restart:
            raise RetrieverError(
                f"{options.folder} holds the vectors of an unfinished build, which --from_index would "
                "discard; finish that one without --from_index, name another --index_path, or pass --restart"
            )
        check_disk(options, count=count, dim=dim, num_unencoded=0)
        return _open_vectors(options.from_index, corpus=corpus, encoder=encoder, trial=trial)
    run = EncodingRun(
        options.folder,
        facts={
            "corpus_bytes": corpus.num_bytes,
            "corpus_sha256": corpus.sha256,  # all of it: a fingerprint misses a changed word
            "encoder_sha256": encoder.sha256,
            **asdict(encoder.recipe),
        },
        count=count,
        dim=dim,
        chunk_size=options.chunk_size,
        restart=options.restart,
    )
    before, started_s = run.num_encoded, time.monotonic()
    check_disk(options, count=count, dim=dim, num_unencoded=count - before)
    if before:
        logger.info("continuing: %d of %d passages are encoded already", before, count)
    report_encoded = partial(report, "encode passages")
    report_encoded(before, count)
    if len(options.devices) == 1:
        encode_here(run, corpus=corpus, encoder=encoder, batch_size=options.batch_size, report=report_encoded)
    else:
        job = EncodingJob(
            corpus_path=options.corpus_path,
            spec=options.encoder,
            batch_size=options.batch_size,
            num_threads=options.num_threads,
        )
        encode_in_processes(run, job, devices=options.devices, report=report_encoded)
    logger.info("encoded %d passages in %.0f s", count - before, time.monotonic() - started_s)
    return run.vectors


def check_disk(options: BuildOptions, *, count: int, dim: int, num_unencoded: int) -> None:
    """Raise RetrieverError when the disk has no room for the vectors and the index."""
    cost = estimate(options.index, count, dim)
    # Codes of whole vectors are written twice: beside the index and into it.
    copied = cost.disk if options.index.kind in SCANNED_KINDS else cost.disk - cost.hot
    needed = num_unencoded * dim * _FLOAT_BYTES + cost.disk + copied
    free = shutil.disk_usage(options.folder).free
    if free < needed + 100_000_000:
        raise RetrieverError(
            f"the build needs {needed / 1e9:.1f} GB in {options.folder}, {free / 1e9:.1f} GB are free; make "
            "room, or name another place with --save_dir or --index_path"
        )


def _open_vectors(path: Path, *, corpus: Corpus, encoder: TextEncoder, trial: Trial) -> VectorSource:
    """Open the rows of an older index, or raw float32 rows. Raises RetrieverError where they do not fit."""
    if not path.is_file():
        raise RetrieverError(f"--from_index {path} is not a file")
    if (recorded := load_manifest(path)) is not None:
        problems = compare_corpus(recorded.corpus, corpus=corpus) + compare_encoder(recorded, encoder=encoder)
        if problems:
            raise RetrieverError(f"{path} is of another corpus or encoder:\n  " + "\n  ".join(problems))
    count, dim = len(corpus), encoder.dim
    is_raw = path.stat().st_size == count * dim * _FLOAT_BYTES
    vectors: VectorSource = (
        VectorFile(path, count=count, dim=dim, writable=False) if is_raw else StoredVectors(path)
    )
    if tuple(vectors.shape) != (count, dim):
        raise RetrieverError(f"{path} holds {vectors.shape} vectors, corpus and encoder need {(count, dim)}")
    for row, known in zip(trial.rows, trial.passages, strict=True):
        stored = np.asarray(vectors[row : row + 1], dtype=np.float32)[0]
        cosine = float(stored @ known / max(np.linalg.norm(stored) * np.linalg.norm(known), 1e-12))
        if cosine < _MIN_COSINE:
            raise RetrieverError(
                f"{path}: the vector of passage {corpus[row].id} has cosine {cosine:.3f} with what the "
                f"encoder makes of it, expected at least {_MIN_COSINE}: other encoder, prefixes or corpus"
            )
    return vectors


def _describe(options: BuildOptions, *, corpus: Corpus, encoder: TextEncoder) -> IndexManifest:
    """Return the manifest without the files."""
    recipe = encoder.recipe
    return IndexManifest(
        kind=str(options.index.kind),
        parameters={"factory": options.index.factory or ""},
        retriever_name=encoder.family,
        encoder=encoder.name,
        encoder_sha256=encoder.sha256,
        pooling=recipe.pooling,
        query_prefix=recipe.query_prefix,
        passage_prefix=recipe.passage_prefix,
        max_length=recipe.max_length,
        dim=encoder.dim,
        normalized=recipe.normalized,
        corpus=corpus.facts,
        count=len(corpus),
        files={},
        faiss_version=FAISS_VERSION,
        built_with=package_version(),
    )


def _write(
    options: BuildOptions,
    manifest: IndexManifest,
    *,
    vectors: VectorSource,
    corpus: Corpus,
    trial: Trial,
    report: Report,
) -> IndexManifest:
    """Write the index, try it, put it in its place; return the whole manifest."""
    built = options.folder / options.index_path.name
    write_index(vectors, built, options=options.index, num_threads=options.num_threads, report=report)
    run_trial(trial, index=open_index(built), corpus=corpus, fix="it is not published; try again")
    facts = describe_file(built, report=partial(report, "hash index"))
    manifest = replace(manifest, files={built.name: facts})
    # The old manifest goes first: after a kill in between, no manifest belongs to another index.
    locate_manifest(options.index_path).unlink(missing_ok=True)
    os.replace(built, options.index_path)
    save_manifest(manifest, locate_manifest(options.index_path))
    return manifest


def take_query(contents: str) -> str:
    """Return a passage's first sentence without its title: the whole passage would find itself at once."""
    text = contents.split("\n", 1)[-1].strip()
    return re.split(r"(?<=[.!?])\s+", text, maxsplit=1)[0] or contents.strip()


def _log_recall(options: BuildOptions, *, vectors: VectorSource, queries: FloatArray, report: Report) -> None:
    """Log the recall of the index against exact search."""
    if options.index.kind is IndexKind.FLAT:
        logger.info("recall against exact search is 1: kind flat is exact")
        return
    topk = min(max(_RECALL_AT), vectors.shape[0])
    _, expected = search_source(vectors, queries, topk=topk, report=partial(report, "measure recall"))
    _, found = open_index(options.index_path).search(queries, topk=topk)
    shares = ", ".join(f"@{k} {compare_rows(found, expected, k=min(k, topk)):.4f}" for k in _RECALL_AT)
    logger.info("recall against exact search, %d queries: %s", len(queries), shares)

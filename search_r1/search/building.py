"""The steps of a build: vectors, index, trial, publishing, recall. All work lies in `<index>.building`."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from search_r1.search.agreement import (
    FloatArray,
    Trial,
    compare_corpus,
    compare_encoder,
    prepare_trial,
    run_trial,
)
from search_r1.search.corpus import Corpus, open_corpus, sample_rows
from search_r1.search.encoding_run import (
    VECTORS_FILE,
    EncoderSpec,
    EncodingRun,
    VectorFile,
    check_disk,
    encode_here,
    encode_in_processes,
    holds_unfinished,
)
from search_r1.search.errors import RetrieverError
from search_r1.search.estimates import estimate
from search_r1.search.fingerprint import FileFacts, describe_file
from search_r1.search.kinds import IndexKind, IndexOptions
from search_r1.search.manifest import VERSION, IndexManifest, load_manifest, locate_manifest
from search_r1.search.progress import format_seconds
from search_r1.search.recall import measure_recall, take_query
from search_r1.search.vector_index import (
    engine_version,
    list_index_files,
    locate_vectors,
    open_index,
    open_vectors,
    write_index,
)
from serving.web.version import package_version

if TYPE_CHECKING:
    from search_r1.search.encoder import TextEncoder
    from search_r1.search.vector_source import VectorSource

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[[str, int, int], None]

_FLOAT_BYTES = 4
_LIKE = 0.98
"""Cosine of a stored vector, perhaps quantized or made in fp16, and the same passage encoded anew."""
_NUM_RECALL_QUERIES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """One build, as asked for."""

    corpus_path: Path
    index_path: Path
    spec: EncoderSpec
    options: IndexOptions
    batch_size: int
    devices: tuple[str | None, ...]
    """One encoding process each; a single one encodes in this process."""
    num_threads: int | None
    vectors_from: Path | None
    """A flat, fp16 or sq8 index, or raw float32 rows, instead of encoding."""
    keep_vectors: Path | None
    restart: bool
    chunk_size: int

    @property
    def folder(self) -> Path:
        return self.index_path.with_name(self.index_path.name + ".building")


def build(plan: BuildPlan, *, report: Report) -> IndexManifest:
    state = _look_at(plan.corpus_path)
    corpus = open_corpus(plan.corpus_path, report=partial(report, "find lines"))
    corpus.check(partial(report, "check passages"))
    encoder = plan.spec.load(plan.devices[0] if len(plan.devices) == 1 else "cpu")
    plan = replace(plan, options=plan.options.resolve(len(corpus), encoder.dim))
    trial = prepare_trial(corpus, encoder)
    questions = _encode_questions(corpus, encoder)
    vectors = _get_vectors(plan, corpus=corpus, encoder=encoder, trial=trial, report=report)
    if _look_at(plan.corpus_path) != state:
        raise RetrieverError(
            f"corpus {plan.corpus_path} was written to while it was encoded; let it be, and start again with"
            " --restart"
        )
    manifest = _describe(plan, corpus=corpus, encoder=encoder)
    del encoder  # its weights and the index need not be in memory together
    gc.collect()
    manifest = _write(plan, manifest, vectors=vectors, corpus=corpus, trial=trial, report=report)
    _say_recall(plan, vectors=vectors, questions=questions, report=report)
    if plan.keep_vectors is not None and plan.vectors_from is None:
        shutil.move(plan.folder / VECTORS_FILE, plan.keep_vectors)
    corpus.close()
    return manifest


def _look_at(path: Path) -> tuple[int, int, int] | None:
    """Changes when the file is written or replaced."""
    if not path.is_file():
        return None
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _get_vectors(
    plan: BuildPlan, *, corpus: Corpus, encoder: TextEncoder, trial: Trial, report: Report
) -> VectorSource:
    """All rows, encoded now or earlier."""
    if plan.vectors_from is not None:
        if plan.vectors_from.resolve() in (path.resolve() for path in _list_targets(plan.index_path)):
            raise RetrieverError(
                f"--from_index {plan.vectors_from} is the index to be written; name another --index_path"
            )
        if holds_unfinished(plan.folder) and not plan.restart:
            raise RetrieverError(
                f"{plan.folder} holds the vectors of an unfinished build, which --from_index would throw"
                " away; finish that one without --from_index, name another --index_path, or pass --restart"
            )
        _check_room(plan, count=len(corpus), dim=encoder.dim, num_unencoded=0)
        return open_known_vectors(plan.vectors_from, corpus=corpus, encoder=encoder, trial=trial)
    run = EncodingRun(
        plan.folder,
        facts={
            "corpus_bytes": corpus.num_bytes,
            "corpus_sha256": corpus.sha256,  # all of it: a fingerprint misses a changed word
            "encoder_sha256": encoder.sha256,
            **asdict(encoder.recipe),
        },
        count=len(corpus),
        dim=encoder.dim,
        chunk_size=plan.chunk_size,
        restart=plan.restart,
    )
    before = run.num_encoded
    _check_room(plan, count=len(corpus), dim=encoder.dim, num_unencoded=len(corpus) - before)
    if before:
        logger.info("going on: %d of %d passages are encoded already", before, len(corpus))
    started = time.monotonic()
    tell = partial(report, "encode passages")
    tell(before, len(corpus))
    if len(plan.devices) == 1:
        encode_here(run, corpus=corpus, encoder=encoder, batch_size=plan.batch_size, report=tell)
    else:
        encode_in_processes(
            run,
            corpus_path=plan.corpus_path,
            spec=plan.spec,
            devices=plan.devices,
            num_threads=plan.num_threads,
            batch_size=plan.batch_size,
            report=tell,
        )
    logger.info("encoded %d passages in %s", len(corpus) - before, format_seconds(time.monotonic() - started))
    return run.vectors


def _check_room(plan: BuildPlan, *, count: int, dim: int, num_unencoded: int) -> None:
    index_bytes = estimate(plan.options, count, dim).disk_bytes
    check_disk(plan.folder, needed=num_unencoded * dim * _FLOAT_BYTES + index_bytes)


def open_known_vectors(path: Path, *, corpus: Corpus, encoder: TextEncoder, trial: Trial) -> VectorSource:
    """Rows of an older index, or raw float32 rows; raises RetrieverError where they are of something else."""
    if not path.is_file():
        raise RetrieverError(f"--from_index {path} is not a file")
    recorded = load_manifest(path)
    problems = [] if recorded is None else compare_corpus(recorded, corpus=corpus, full=False)
    problems += [] if recorded is None else compare_encoder(recorded, encoder=encoder)
    if problems:
        raise RetrieverError(f"{path} is of another corpus or encoder:\n  " + "\n  ".join(problems))
    shape = (len(corpus), encoder.dim)
    if path.stat().st_size == shape[0] * shape[1] * _FLOAT_BYTES:
        vectors: VectorSource = VectorFile(path, count=shape[0], dim=shape[1], writable=False)
    else:
        vectors = open_vectors(path)
    if tuple(vectors.shape) != shape:
        raise RetrieverError(f"{path} holds {vectors.shape} vectors, corpus and encoder need {shape}")
    for row, known in zip(trial.rows, trial.passages, strict=True):
        stored = np.asarray(vectors[row : row + 1], dtype=np.float32)[0]
        likeness = float(stored @ known / max(np.linalg.norm(stored) * np.linalg.norm(known), 1e-12))
        if likeness < _LIKE:
            raise RetrieverError(
                f"{path}: the vector of passage {corpus[row].id} has cosine {likeness:.3f} with what the "
                f"encoder makes of it, expected {_LIKE} or more: other encoder, prefixes or corpus"
            )
    return vectors


def _describe(plan: BuildPlan, *, corpus: Corpus, encoder: TextEncoder) -> IndexManifest:
    """All but the files."""
    recipe = encoder.recipe
    parameters = plan.options.as_facts()
    return IndexManifest(
        version=VERSION,
        kind=str(parameters.pop("kind")),
        parameters=parameters,
        retriever_name=encoder.retriever_name,
        encoder=encoder.name,
        encoder_sha256=encoder.sha256,
        pooling=recipe.pooling,
        query_prefix=recipe.query_prefix,
        passage_prefix=recipe.passage_prefix,
        max_length=recipe.max_length,
        dim=encoder.dim,
        metric=recipe.similarity,
        normalised=recipe.normalised,
        corpus=FileFacts(bytes=corpus.num_bytes, fingerprint=corpus.fingerprint, sha256=corpus.sha256),
        count=len(corpus),
        files={},
        faiss_version=engine_version(),
        built_with=package_version(),
    )


def _write(
    plan: BuildPlan,
    manifest: IndexManifest,
    *,
    vectors: VectorSource,
    corpus: Corpus,
    trial: Trial,
    report: Report,
) -> IndexManifest:
    """Write the index, try it, put it in its place; returns the whole manifest."""
    built = plan.folder / plan.index_path.name
    write_index(vectors, built, options=plan.options, num_threads=plan.num_threads, report=report)
    run_trial(trial, index=open_index(built), corpus=corpus, needed="it is not published; try again")
    files = list_index_files(built, plan.options.kind)
    whole = replace(
        manifest,
        files={file.name: describe_file(file, report=partial(report, "hash index")) for file in files},
    )
    _publish(files, whole, index_path=plan.index_path)
    return whole


def _publish(files: Sequence[Path], manifest: IndexManifest, *, index_path: Path) -> None:
    """The old files go before the new ones come, the index itself last: killed in between, there is no index
    beside the vectors of another, and no manifest vouches for a wrong one."""
    for old in (locate_manifest(index_path), *_list_targets(index_path)):
        old.unlink(missing_ok=True)
    for file in reversed(files):
        os.replace(file, index_path.with_name(file.name))
    manifest.save(index_path)


def _list_targets(index_path: Path) -> tuple[Path, Path]:
    """Where files of any kind of index come to lie."""
    return index_path, locate_vectors(index_path)


def _encode_questions(corpus: Corpus, encoder: TextEncoder) -> FloatArray:
    """[queries, dim]: what recall is measured with, the first sentences of passages all over the corpus."""
    rows = sample_rows(len(corpus), size=_NUM_RECALL_QUERIES)
    return encoder.encode_queries([take_query(corpus[row].contents) for row in rows])


def _say_recall(plan: BuildPlan, *, vectors: VectorSource, questions: FloatArray, report: Report) -> None:
    """How much of what exact search finds the index finds."""
    if plan.options.kind is IndexKind.FLAT:
        logger.info("recall against exact search is 1: kind flat is exact")
        return
    recall = measure_recall(
        open_index(plan.index_path),
        reference=vectors,
        queries=questions,
        report=partial(report, "measure recall"),
    )
    figures = ", ".join(f"@{k} {share:.4f}" for k, share in recall.at.items())
    logger.info("recall against exact search, %d queries: %s", recall.num_queries, figures)

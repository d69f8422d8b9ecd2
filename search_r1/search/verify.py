"""`index verify`: read index and corpus whole and compare them with the manifest.

A server's start compares fingerprints, in milliseconds; this reads every byte (about a second per 1.5 GB).
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from search_r1.search import defaults
from search_r1.search.corpus import open_corpus
from search_r1.search.errors import RetrieverError
from search_r1.search.files import list_changed_files
from search_r1.search.manifest import load_manifest
from search_r1.search.progress import PhaseProgress
from search_r1.search.recipes import EncoderSpec, add_recipe_arguments, read_recipe_flags

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `index verify`."""
    add = parser.add_argument
    add("--index_path", default=str(defaults.INDEX_PATH), help="the index, or the folder of a bm25 index")
    add("--corpus_path", default=str(defaults.CORPUS_PATH), help="the corpus that it should be of")
    add("--retriever_model", help="the encoder that it should be of, folder or hub id (default: not checked)")
    add("--retriever_name", help="its family, where neither manifest nor model state how it encodes")
    add_recipe_arguments(parser)


def run(settings: argparse.Namespace) -> int:
    """Check everything and log what differs. Exit status 0, or 1 when something does."""
    index_path, corpus_path = Path(settings.index_path), Path(settings.corpus_path)
    if index_path.is_dir():
        from search_r1.search.bm25 import load_bm25

        lexical = load_bm25(index_path, corpus_path=corpus_path, full_check=True)
        logger.info("%s: whole, and of this corpus (%d passages)", index_path, len(lexical))
        lexical.close()
        return 0
    spec = None
    if settings.retriever_model is not None:
        spec = EncoderSpec(
            path=settings.retriever_model,
            family=settings.retriever_name,
            flags=read_recipe_flags(settings),
        )
    problems = list_problems(index_path, corpus_path=corpus_path, spec=spec)
    for problem in problems:
        logger.error("%s", problem)
    if not problems:
        checked = "corpus and encoder" if spec else "corpus"
        logger.info("%s: whole, and of this %s", index_path, checked)
    return 1 if problems else 0


def list_problems(index_path: Path, *, corpus_path: Path, spec: EncoderSpec | None) -> list[str]:
    """Return one line for everything that differs. Raises RetrieverError where there is nothing to check.

    The encoder is checked where there is a `spec`.
    """
    if not index_path.is_file():
        raise RetrieverError(f"index {index_path} is not a file; pass --index_path of the index")
    recorded = load_manifest(index_path)
    if recorded is None:
        logger.warning("there is no manifest of %s: its bytes cannot be checked", index_path)
    problems = []
    if recorded is not None:
        problems += list_changed_files(recorded.files, index_path.parent, full=True)
    with PhaseProgress() as progress:
        corpus = open_corpus(corpus_path, report=partial(progress, "find lines"))
        try:
            corpus.check(partial(progress, "check passages"))
        except RetrieverError as error:
            problems.append(str(error))
    if problems:  # a damaged index may crash Faiss
        return problems
    from search_r1.search.agreement import complete_spec, list_misfits, prepare_trial, run_trial
    from search_r1.search.encoder import TextEncoder
    from search_r1.search.vector_index import open_index

    index = open_index(index_path)
    encoder = None if spec is None else TextEncoder(complete_spec(spec, recorded))
    problems = list_misfits(recorded, index=index, corpus=corpus, encoder=encoder, full=True)
    if not problems and encoder is not None:
        try:
            trial = prepare_trial(corpus, encoder)
            run_trial(trial, index=index, corpus=corpus, fix="rebuild the index with this encoder")
        except RetrieverError as error:
            problems.append(str(error))
    corpus.close()
    return problems

"""Corpus to index and manifest: encode every passage, write both files atomically.

    python -m search_r1.search.index_builder --retrieval_method e5 --model_path intfloat/e5-base-v2 \\
        --corpus_path wiki-18.jsonl --save_dir index
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from search_r1.search import defaults
from search_r1.search.corpus import open_corpus
from search_r1.search.dense import VectorIndex, describe_index
from search_r1.search.encoder import TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.manifest import IndexManifest, hash_index, locate_manifest
from search_r1.search.recipes import FAMILIES

logger = logging.getLogger(__name__)


def build_index(
    corpus_path: Path | str,
    *,
    encoder_path: Path | str,
    index_path: Path | str,
    retriever_name: str = defaults.RETRIEVER_NAME,
    batch_size: int = 256,
    device: str | None = None,
    report: Callable[[int, int], None] | None = None,
) -> IndexManifest:
    """Write `index_path` and its manifest, replacing older ones; raises RetrieverError on bad input.

    `device` None: a GPU if there is one. `report(encoded, total)` is called after every batch of passages.
    """
    index_path = Path(index_path)
    corpus = open_corpus(Path(corpus_path))
    encoder = TextEncoder(encoder_path, retriever_name=retriever_name, device=device)
    index = VectorIndex.create_flat(encoder.dim)
    documents = (corpus[row] for row in range(len(corpus)))
    while batch := list(itertools.islice(documents, batch_size)):
        index.add(encoder.encode_passages([document.contents for document in batch], batch_size=batch_size))
        if report is not None:
            report(len(index), len(corpus))
    index_path.parent.mkdir(parents=True, exist_ok=True)
    # Without the old manifest first: killed between the two writes, no manifest vouches for a wrong index.
    locate_manifest(index_path).unlink(missing_ok=True)
    index.save(index_path)
    manifest = describe_index(
        index,
        index_sha256=hash_index(index_path),
        corpus=corpus,
        encoder=encoder,
        retriever_name=retriever_name,
    )
    manifest.save(index_path)
    corpus.close()
    return manifest


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="index_builder",
        description="Encode a JSONL corpus and write a flat Faiss index with its manifest. "
        "Without arguments: the index of the embedded world.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--corpus_path", default=str(defaults.CORPUS_PATH), help='lines {"id", "contents"}')
    add("--model_path", default=str(defaults.ENCODER_PATH), help="encoder: folder or cached model name")
    add("--retrieval_method", default=defaults.RETRIEVER_NAME, choices=sorted(FAMILIES), help="family")
    add("--save_dir", default=str(defaults.INDEX_DIR), help="the index is <save_dir>/<method>_Flat.index")
    add("--index_path", default=None, help="file of the index, instead of --save_dir")
    add("--batch_size", default=256, type=int, help="passages encoded at once")
    add("--max_length", default=256, type=int, choices=[256], help="tokens of a passage")
    add("--pooling_method", default="mean", choices=["mean"], help="of the encoder's states")
    add("--faiss_type", default="Flat", choices=["Flat"], help="kind of index")
    add("--use_fp16", action="store_true", help="accepted; fp16 is used on a GPU and never on a CPU")
    settings = parser.parse_args(arguments)
    if settings.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {settings.batch_size}")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 built, 1 bad input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = _parse_arguments(arguments)
    index_path = settings.index_path or Path(settings.save_dir) / defaults.name_index(
        settings.retrieval_method
    )
    columns = (TextColumn("encoding passages"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("encode", total=None)
            manifest = build_index(
                settings.corpus_path,
                encoder_path=settings.model_path,
                index_path=index_path,
                retriever_name=settings.retrieval_method,
                batch_size=settings.batch_size,
                report=lambda encoded, total: progress.update(task, completed=encoded, total=total),
            )
    except RetrieverError as error:
        logger.error("no index was written: %s", error)
        return 1
    logger.info("wrote %s: %d passages, dimension %d", index_path, manifest.count, manifest.dim)
    return 0


if __name__ == "__main__":
    sys.exit(main())

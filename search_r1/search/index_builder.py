"""Corpus to index and manifest: encode every passage, write the index, measure it, publish it.

    python -m search_r1.search.index_builder --model_path intfloat/e5-base-v2 --corpus_path wiki-18.jsonl \\
        --save_dir index --kind sq8

All work lies in `<index>.building` until the index is whole: a build that was killed goes on from there, and
an older index stays in its place, with its manifest, until the new one takes it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from search_r1.search import defaults
from search_r1.search.building import BuildPlan, Report, build
from search_r1.search.encoding_run import CHUNK_SIZE, EncoderSpec, holds_unfinished, lock_folder
from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import IndexOptions, Storage, parse_options
from search_r1.search.manifest import IndexManifest
from search_r1.search.progress import PhaseProgress, format_seconds
from search_r1.search.recipes import FAMILIES, POOLINGS
from serving.logs import configure_logging
from serving.web.settings import expand_home

logger = logging.getLogger(__name__)

_BM25 = "bm25"
_KIND_FLAGS = ("num_lists", "pq_bytes", "num_links", "ef_construction", "storage", "rescore_storage", "seed")


def build_index(
    corpus_path: Path | str,
    *,
    encoder_path: Path | str,
    index_path: Path | str,
    retriever_name: str | None = None,
    options: IndexOptions | None = None,
    batch_size: int = 256,
    devices: Sequence[str | None] | None = None,
    num_processes: int | None = None,
    num_threads: int | None = None,
    use_fp16: bool | None = None,
    max_length: int | None = None,
    pooling: str | None = None,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    normalised: bool | None = None,
    from_index: Path | str | None = None,
    keep_vectors: Path | str | None = None,
    restart: bool = False,
    chunk_size: int = CHUNK_SIZE,
    report: Report | None = None,
) -> IndexManifest:
    """Write `index_path` and its manifest, replacing older ones; raises RetrieverError on bad input.

    `devices` None: every GPU, else the CPU. Each encodes in a process of its own; `num_processes` shares them
    out among as many. `from_index`: take the vectors of this flat, fp16 or sq8 index (or file of raw float32
    rows) of the same corpus and encoder, and encode nothing but a trial. `keep_vectors`: keep the encoded
    rows there. `restart`: throw away unfinished work. `report(phase, done, total)` is called all along.
    """
    plan = BuildPlan(
        corpus_path=Path(corpus_path),
        index_path=Path(index_path),
        spec=EncoderSpec(
            path=str(encoder_path),
            retriever_name=retriever_name,
            use_fp16=use_fp16,
            max_length=max_length,
            pooling=pooling,
            query_prefix=query_prefix,
            passage_prefix=passage_prefix,
            normalised=normalised,
        ),
        options=options or IndexOptions(),
        batch_size=batch_size,
        devices=share_devices(devices, num_processes=num_processes),
        num_threads=num_threads,
        vectors_from=Path(from_index) if from_index else None,
        keep_vectors=Path(keep_vectors) if keep_vectors else None,
        restart=restart,
        chunk_size=chunk_size,
    )
    lock = lock_folder(plan.folder)
    try:
        manifest = build(plan, report=report or _be_silent)
    except BaseException:
        if not holds_unfinished(plan.folder):
            shutil.rmtree(plan.folder)
        raise
    else:
        shutil.rmtree(plan.folder)
    finally:
        os.close(lock)
    return manifest


def share_devices(
    devices: Sequence[str | None] | None, *, num_processes: int | None
) -> tuple[str | None, ...]:
    """The device of every encoding process. None as a device: whatever the encoder chooses."""
    if devices is None and num_processes is None:
        import torch

        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = devices or [None]
    return tuple(devices[number % len(devices)] for number in range(num_processes or len(devices)))


def _be_silent(phase: str, done: int, total: int) -> None:
    """Nobody asked for reports."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The published flags of Search-R1's builder and ours."""
    add = parser.add_argument
    add("--corpus_path", default=str(defaults.CORPUS_PATH), help="JSONL or Arrow with id and contents")
    add("--model_path", default=str(defaults.ENCODER_PATH), help="encoder: folder or name on the hub")
    add(
        "--retrieval_method",
        choices=[*sorted(FAMILIES), _BM25],
        help="family of the encoder, for what its files do not say (default: by its name), or bm25",
    )
    add(
        "--save_dir",
        help="the index is <save_dir>/<method>_<kind>.index "
        f"(default: {defaults.INDEX_DIR} for the embedded world, else ./index)",
    )
    add("--index_path", help="file of the index, instead of --save_dir")
    add(
        "--kind",
        "--faiss_type",
        default="Flat",
        help="flat, fp16, sq8, ivf, ivf_pq, hnsw, binary or a Faiss name",
    )
    add("--batch_size", default=256, type=_parse_positive, help="passages encoded at once")
    add(
        "--max_length",
        type=_parse_positive,
        help="tokens of a passage (default: the model's or its family's)",
    )
    add(
        "--pooling_method",
        help=f"of the token states: {', '.join(POOLINGS)}, or several joined by + (default: as --max_length)",
    )
    add("--query_prefix", help="put before every query (default: as --max_length)")
    add("--passage_prefix", help="put before every passage (default: as --max_length)")
    add(
        "--use_fp16",
        action="store_true",
        help="encode in fp16 on GPUs, which is the default there; never on a CPU",
    )
    add("--devices", nargs="+", help="for encoding, like cuda:0 cuda:1 or cpu (default: every GPU, else cpu)")
    add("--num_processes", type=_parse_positive, help="encoding processes (default: one per device)")
    add("--num_threads", type=_parse_positive, help="of each encoding process and of writing the index")
    add(
        "--from_index",
        "--embedding_path",
        help="take the vectors of this flat, fp16 or sq8 index (or raw float32)",
    )
    add("--save_embedding", action="store_true", help="keep the vectors as <save_dir>/emb_<method>.memmap")
    add("--restart", action="store_true", help="throw away what an unfinished build left")
    add("--faiss_gpu", action="store_true", help="accepted; indexes are written on the CPU")
    add("--num_lists", type=int, help="of ivf and ivf_pq (default: chosen by size, as all that follow)")
    add("--pq_bytes", type=int, help="bytes of a vector in ivf_pq")
    add("--num_links", type=int, help="links of a node in hnsw")
    add("--ef_construction", type=int, help="candidates while hnsw is built")
    add("--storage", type=Storage, choices=list(Storage), help="of the vectors in ivf and hnsw")
    add(
        "--rescore_storage",
        type=Storage,
        choices=list(Storage),
        help="of the rescoring vectors of ivf_pq, binary",
    )
    add("--seed", type=int, help="of the samples that train an index")
    add("--bm25_language", default="english", choices=["english", "none"], help="stemming of bm25")


def _parse_positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(settings: argparse.Namespace) -> int:
    """Build. Exit status 0; raises RetrieverError."""
    started = time.monotonic()
    with PhaseProgress() as progress:
        if settings.retrieval_method == _BM25:
            path, count = _build_words(settings, progress)
        else:
            path, count = _build_vectors(settings, progress)
    logger.info("wrote %s: %d passages, in %s", path, count, format_seconds(time.monotonic() - started))
    return 0


def _build_words(settings: argparse.Namespace, report: Report) -> tuple[Path, int]:
    from search_r1.search.bm25 import build_bm25

    path = Path(settings.index_path or choose_folder(settings) / _BM25)
    manifest = build_bm25(
        Path(settings.corpus_path), index_path=path, language=settings.bm25_language, report=report
    )
    return path, manifest.count


def _build_vectors(settings: argparse.Namespace, report: Report) -> tuple[Path, int]:
    method = choose_method(settings.retrieval_method, model_path=settings.model_path)
    name = defaults.name_index(method or Path(settings.model_path).name, settings.kind)
    path = Path(settings.index_path or choose_folder(settings) / name)
    options = parse_options(settings.kind)
    given = {name: getattr(settings, name) for name in _KIND_FLAGS if getattr(settings, name) is not None}
    manifest = build_index(
        settings.corpus_path,
        encoder_path=settings.model_path,
        index_path=path,
        retriever_name=method,
        options=replace(options, **given),
        batch_size=settings.batch_size,
        devices=settings.devices,
        num_processes=settings.num_processes,
        num_threads=settings.num_threads,
        use_fp16=settings.use_fp16 or None,
        max_length=settings.max_length,
        pooling=settings.pooling_method,
        query_prefix=settings.query_prefix,
        passage_prefix=settings.passage_prefix,
        from_index=settings.from_index,
        keep_vectors=path.with_name(f"emb_{method or 'encoder'}.memmap") if settings.save_embedding else None,
        restart=settings.restart,
        report=report,
    )
    return path, manifest.count


def choose_folder(settings: argparse.Namespace) -> Path:
    """An index of another corpus or by another encoder must not take the place of the embedded world's."""
    if settings.save_dir is not None:
        return Path(settings.save_dir)
    of_world = (
        Path(settings.corpus_path).resolve() == defaults.CORPUS_PATH.resolve()
        and Path(settings.model_path).resolve() == defaults.ENCODER_PATH.resolve()
    )
    return defaults.INDEX_DIR if of_world else Path("index")


def choose_method(given: str | None, *, model_path: str) -> str | None:
    """The embedded world's encoder does not say what it is: it is of family e5."""
    is_default = Path(model_path).resolve() == defaults.ENCODER_PATH.resolve()
    return given or (defaults.RETRIEVER_NAME if is_default else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 built, 1 bad input, 2 bad flags."""
    configure_logging(
        "%(asctime)s %(levelname)s %(message)s",
        quiet=("faiss", "faiss.loader", "httpx", "sentence_transformers"),
    )
    parser = argparse.ArgumentParser(
        prog="index_builder",
        description="Build the index of a corpus, with its manifest; goes on where a killed build stopped. "
        "Without arguments: the index of the embedded world.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(expand_home(arguments)))
    except RetrieverError as error:
        logger.error("no index was written: %s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())

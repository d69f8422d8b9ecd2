"""`index build`: corpus to index and manifest. Encode every passage, write the index, measure it, publish it.

index build --model_path intfloat/e5-base-v2 --corpus_path wiki-18.jsonl --save_dir index --kind sq8
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from search_r1.search import defaults
from search_r1.search.kinds import parse_options
from search_r1.search.manifest import BM25_LANGUAGES
from search_r1.search.progress import PhaseProgress
from search_r1.search.recipes import FAMILIES, POOLINGS, EncoderSpec, read_recipe_flags

logger = logging.getLogger(__name__)

_BM25 = "bm25"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the published flags of Search-R1's builder and ours."""
    add = parser.add_argument
    add("--corpus_path", default=str(defaults.CORPUS_PATH), help="JSONL or Arrow with id and contents")
    add("--model_path", default=str(defaults.ENCODER_PATH), help="encoder: folder or hub id")
    add(
        "--retrieval_method",
        choices=[*sorted(FAMILIES), _BM25],
        help="family of the encoder, for what its files do not state (default: by its name), or bm25",
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
        help="flat, fp16, sq8, ivf_pq, hnsw, or a Faiss factory string such as IVF4096,PQ96",
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
    add("--num_threads", type=_parse_positive, help="of each encoding process and of writing the index")
    add(
        "--from_index",
        "--embedding_path",
        help="take the vectors of this flat, fp16 or sq8 index (or raw float32)",
    )
    add("--save_embedding", action="store_true", help="keep the vectors as <save_dir>/emb_<method>.memmap")
    add("--restart", action="store_true", help="discard what an unfinished build left")
    add("--faiss_gpu", action="store_true", help="accepted; indexes are written on the CPU")
    add("--bm25_language", default="english", choices=BM25_LANGUAGES, help="stemming of bm25")


def _parse_positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(settings: argparse.Namespace) -> int:
    """Build. Exit status 0; raises RetrieverError."""
    started_s = time.monotonic()
    build = _build_bm25 if settings.retrieval_method == _BM25 else _build_dense
    with PhaseProgress() as progress:
        path, count = build(settings, progress)
    logger.info("wrote %s: %d passages, in %.0f s", path, count, time.monotonic() - started_s)
    return 0


def _build_bm25(settings: argparse.Namespace, report: Callable[[str, int, int], None]) -> tuple[Path, int]:
    from search_r1.search.bm25 import build_bm25

    path = Path(settings.index_path or _choose_folder(settings) / _BM25)
    manifest = build_bm25(
        Path(settings.corpus_path), index_path=path, language=settings.bm25_language, report=report
    )
    return path, manifest.count


def _build_dense(settings: argparse.Namespace, report: Callable[[str, int, int], None]) -> tuple[Path, int]:
    options = parse_options(settings.kind)  # before torch is imported
    from search_r1.search.building import BuildOptions, build_index

    method = settings.retrieval_method
    if method is None and _is_same_path(settings.model_path, defaults.ENCODER_PATH):
        method = defaults.RETRIEVER_NAME  # the embedded world's encoder does not state its family
    name = defaults.name_index(method or Path(settings.model_path).name, settings.kind)
    path = Path(settings.index_path or _choose_folder(settings) / name)
    manifest = build_index(
        BuildOptions(
            corpus_path=Path(settings.corpus_path),
            index_path=path,
            encoder=EncoderSpec(
                path=settings.model_path,
                family=method,
                flags=read_recipe_flags(settings),
                use_fp16=settings.use_fp16 or None,
            ),
            index=options,
            batch_size=settings.batch_size,
            devices=tuple(settings.devices or ()),
            num_threads=settings.num_threads,
            from_index=Path(settings.from_index) if settings.from_index else None,
            keep_vectors=path.with_name(f"emb_{method or 'encoder'}.memmap")
            if settings.save_embedding
            else None,
            restart=settings.restart,
        ),
        report=report,
    )
    return path, manifest.count


def _choose_folder(settings: argparse.Namespace) -> Path:
    """Return where the index goes: one of other files must not replace the embedded world's."""
    if settings.save_dir is not None:
        return Path(settings.save_dir)
    is_world = _is_same_path(settings.corpus_path, defaults.CORPUS_PATH) and _is_same_path(
        settings.model_path, defaults.ENCODER_PATH
    )
    return defaults.INDEX_DIR if is_world else Path("index")


def _is_same_path(path: str, default: Path) -> bool:
    return Path(path).resolve() == default.resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `index build`, under the name of Search-R1's builder; return its exit status."""
    from search_r1.search.index_cli import main as run_command

    return run_command(["build", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())

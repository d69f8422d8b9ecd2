"""Settings of the retriever, each defined once: flag over environment variable over default.

Two tables make the command line, its help and the tables of README.md: which retriever is opened, which other
commands ask as well, and how it is served. Online engines bring flags of their own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from search_r1.search import defaults
from search_r1.search.errors import RetrieverError
from search_r1.search.online.options import (
    ONLINE_NAMES,
    OnlineOptions,
    add_online_arguments,
    resolve_online,
)
from search_r1.search.recipes import add_recipe_arguments
from search_r1.search.schema import MAX_TIMEOUT_S, MAX_TOPK
from serving.web.settings import (
    Parse,
    Setting,
    SettingError,
    Value,
    add_settings,
    expand_home,
    parse_integer,
    parse_path,
    parse_real,
    parse_switch,
    parse_text,
    parse_token,
    read_token_file,
    resolve_settings,
)

BM25 = "bm25"
HYBRID = "hybrid"
DEVICES = ("cpu", "faiss_gpu", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How the encoder wants its texts, where neither a manifest nor the model says so. None: not told."""

    pooling_method: str | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None
    max_length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieverSettings:
    """Which retriever to open, and how. Zeros mean that the kind of the index decides."""

    retriever_name: str
    """A family of encoders, empty for the index's own; or `bm25`, `hybrid`, an online engine."""
    index_path: Path
    corpus_path: Path
    retriever_model: str
    encoding: Encoding
    index_device: str
    mmap: bool
    nprobe: int
    ef_search: int
    rescore_factor: int
    bm25_index_path: Path
    hybrid_depth: int
    reranker_model: str
    rerank_depth: int
    num_threads: int
    online: OnlineOptions

    @property
    def is_online(self) -> bool:
        """Whether it asks others; then no file of ours is read."""
        return self.retriever_name in ONLINE_NAMES

    @property
    def files(self) -> list[str]:
        """What is read, for people."""
        files = [str(self.corpus_path), str(self.index_path)]
        if self.retriever_name == HYBRID:
            files.append(str(self.bm25_index_path))
        if self.retriever_name != BM25:
            files.append(self.retriever_model)
        return files + [self.reranker_model] * bool(self.reranker_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the retriever is served."""

    host: str
    port: int
    topk: int
    batching: bool
    max_batch: int
    batch_window_ms: float
    cache_size: int
    max_queue: int
    max_queries: int
    max_body_mb: float
    request_timeout_s: float
    shutdown_grace_s: float
    token: str = field(repr=False)
    """Callers must present it as a bearer token; empty lets everyone in."""

    @property
    def max_body_bytes(self) -> int:
        """Longest request body."""
        return int(self.max_body_mb * 2**20)


def _setting(
    name: str,
    default: str,
    parse: Parse,
    meaning: str,
    *,
    env: str = "",
    shown_default: str = "",
    parse_flag: Parse | None = None,
) -> Setting:
    return Setting(
        name=name,
        flag=f"--{name}" if parse_flag is None else f"--{name}_file",
        env=env or f"RETRIEVER_{name.upper()}",
        default=default,
        parse=parse,
        meaning=meaning,
        shown_default=shown_default,
        parse_flag=parse_flag,
    )


def _parse_optional_path(text: str) -> Value:
    return parse_path(text) if text else ""


def _parse_name(text: str) -> Value:
    return text.lower()


def _parse_device(text: str) -> Value:
    if text and text not in DEVICES:
        raise SettingError(f"{text!r}, expected one of {', '.join(DEVICES)}")
    return text


RETRIEVER_SETTINGS: tuple[Setting, ...] = (
    _setting(
        "retriever_name",
        "",
        _parse_name,
        "family of the encoder (e5, bge, gte, ...), or bm25, hybrid (dense and bm25), or an online engine: "
        + ", ".join(ONLINE_NAMES),
        env="RETRIEVER_NAME",
        shown_default="the family that the index was built with",
    ),
    _setting(
        "bm25_index_path",
        str(defaults.INDEX_DIR / "bm25"),
        parse_path,
        "folder of the BM25 index, for hybrid",
        env="BM25_INDEX_PATH",
        shown_default="world/index/bm25",
    ),
    _setting(
        "index_path",
        "",
        parse_path,
        "index: a file of Faiss, or the folder of a BM25 index for bm25",
        env="INDEX_PATH",
        shown_default="world/index/e5_Flat.index",
    ),
    _setting(
        "corpus_path",
        str(defaults.CORPUS_PATH),
        parse_path,
        'passages: JSONL with {"id", "contents"} per line, or Arrow',
        env="CORPUS_PATH",
        shown_default="world/corpus.jsonl",
    ),
    _setting(
        "retriever_model",
        str(defaults.ENCODER_PATH),
        parse_path,
        "encoder: a folder or the name of a cached model",
        env="RETRIEVER_MODEL",
        shown_default="world/models/encoder",
    ),
    _setting("faiss_gpu", "false", parse_switch, "search on all visible GPUs by a GPU build of Faiss"),
    _setting(
        "index_device",
        "",
        _parse_device,
        "where to search: cpu, faiss_gpu, or torch (exact, by torch on GPUs)",
        shown_default="cpu",
    ),
    _setting("no_mmap", "false", parse_switch, "read the index into memory instead of mapping its file"),
    _setting(
        "nprobe", "0", parse_integer(0), "lists that ivf and ivf_pq look into", shown_default="the kind's own"
    ),
    _setting(
        "ef_search",
        "0",
        parse_integer(0),
        "candidates that hnsw keeps while it searches",
        shown_default="the kind's own",
    ),
    _setting(
        "rescore_factor",
        "0",
        parse_integer(0),
        "candidates per passage that ivf_pq and binary score again",
        shown_default="the kind's own",
    ),
    _setting("hybrid_depth", "100", parse_integer(1, MAX_TOPK), "passages of each part that hybrid joins"),
    _setting(
        "reranker_model",
        "",
        _parse_optional_path,
        "cross-encoder that orders the passages again: a folder or the name of a cached model",
        shown_default="none",
    ),
    _setting("rerank_depth", "20", parse_integer(1, MAX_TOPK), "passages that the reranker looks at"),
    _setting(
        "num_threads",
        "0",
        parse_integer(0, 4096),
        "for encoding and search on the CPU",
        shown_default="half of the cores: the trainer works next door",
    ),
)

SERVER_SETTINGS: tuple[Setting, ...] = (
    _setting("host", "127.0.0.1", parse_text, "address to listen on; 0.0.0.0 for other machines"),
    _setting("port", "8000", parse_integer(0, 65535), "port to listen on; 0 takes a free one"),
    _setting(
        "topk",
        "3",
        parse_integer(1, MAX_TOPK),
        "passages per query where the request names no number",
        env="TOPK",
    ),
    _setting("no_batching", "false", parse_switch, "search for every request by itself"),
    _setting("max_batch", "256", parse_integer(1, 65536), "queries of one search"),
    _setting(
        "batch_window_ms",
        "2",
        parse_real(0, 1000),
        "how long a query waits for others to be searched with; longer where searches are slow",
    ),
    _setting("cache_size", "10000", parse_integer(0), "answers that are remembered; 0 for none"),
    _setting("max_queue", "4096", parse_integer(1), "queries accepted and not answered yet; more get 429"),
    _setting("max_queries", "4096", parse_integer(1), "queries per request; more get 413"),
    _setting(
        "max_body_mb", "16", parse_real(0, 4096, open_low=True), "longest request body, in MiB; more gets 413"
    ),
    _setting(
        "request_timeout_s",
        "60",
        parse_real(0, MAX_TIMEOUT_S, open_low=True),
        "deadline of a request that carries none",
    ),
    _setting(
        "shutdown_grace_s",
        "10",
        parse_real(0, MAX_TIMEOUT_S),
        "how long accepted work may go on when asked to stop",
    ),
    _setting(
        "token",
        "",
        parse_token,
        "bearer token that callers must present; the flag takes a file that holds it",
        shown_default="none",
        parse_flag=read_token_file,
    ),
)


def add_retriever_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every retriever, for `resolve_retriever`."""
    add_settings(parser.add_argument_group("retriever"), RETRIEVER_SETTINGS)
    add_recipe_arguments(parser, default=argparse.SUPPRESS)
    add_online_arguments(parser)


def resolve_retriever(
    namespace: argparse.Namespace, *, environ: Mapping[str, str] | None = None
) -> RetrieverSettings:
    """Settle the flags of `add_retriever_arguments`. Raises RetrieverError."""
    variables = os.environ if environ is None else environ
    values = _resolve(RETRIEVER_SETTINGS, namespace, environ=variables)
    if values.pop("faiss_gpu"):
        if values["index_device"] not in ("", "faiss_gpu"):
            raise RetrieverError(
                f"--faiss_gpu and --index_device {values['index_device']} exclude each other; leave one out"
            )
        values["index_device"] = "faiss_gpu"
    return RetrieverSettings(
        retriever_name=str(values["retriever_name"]),
        index_path=Path(str(values["index_path"])),
        corpus_path=Path(str(values["corpus_path"])),
        retriever_model=str(values["retriever_model"]),
        encoding=Encoding(**{field.name: vars(namespace).get(field.name) for field in fields(Encoding)}),
        index_device=str(values["index_device"]) or "cpu",
        mmap=not values["no_mmap"],
        nprobe=int(values["nprobe"]),
        ef_search=int(values["ef_search"]),
        rescore_factor=int(values["rescore_factor"]),
        bm25_index_path=Path(str(values["bm25_index_path"])),
        hybrid_depth=int(values["hybrid_depth"]),
        reranker_model=str(values["reranker_model"]),
        rerank_depth=int(values["rerank_depth"]),
        num_threads=int(values["num_threads"]) or max(1, len(os.sched_getaffinity(0)) // 2),
        online=resolve_online(namespace, variables),
    )


def build_parser() -> argparse.ArgumentParser:
    """Command line of the server; most values stay text until they are resolved."""
    parser = argparse.ArgumentParser(
        prog="retrieval_server",
        description="Serve a retriever over HTTP. Without arguments: the embedded world. A flag wins over "
        "its variable.",
        allow_abbrev=False,
    )
    add_retriever_arguments(parser)
    add_settings(parser.add_argument_group("server"), SERVER_SETTINGS)
    return parser


def resolve_server(
    arguments: Sequence[str] = (), *, environ: Mapping[str, str] | None = None
) -> tuple[ServerSettings, RetrieverSettings]:
    """Settle every setting. Raises RetrieverError; exits as argparse does on a flag it does not know."""
    namespace = build_parser().parse_args(expand_home(arguments))
    variables = os.environ if environ is None else environ
    values = _resolve(SERVER_SETTINGS, namespace, environ=variables)
    batching = not values.pop("no_batching")
    server = ServerSettings(batching=batching, **values)  # type: ignore[arg-type]
    return server, resolve_retriever(namespace, environ=variables)


def _resolve(
    settings: Sequence[Setting], namespace: argparse.Namespace, *, environ: Mapping[str, str]
) -> dict[str, Value]:
    try:
        return resolve_settings(
            settings, flags=vars(namespace), environ=environ, derive_default=_derive_default
        )
    except SettingError as error:
        raise RetrieverError(str(error)) from None


def _derive_default(setting: Setting, values: Mapping[str, Value]) -> str:
    if setting.name != "index_path":
        return setting.default
    return str(values["bm25_index_path"] if values["retriever_name"] == BM25 else defaults.INDEX_PATH)

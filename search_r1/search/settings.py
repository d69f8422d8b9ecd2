"""Settings of the retriever, each defined once: flag over environment variable over default.

Three tables make the command line, its help and the tables of README.md: which retriever is opened, how an
online engine is asked, and how it is served.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from search_r1.search import defaults
from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import Device, SearchOptions
from search_r1.search.online.options import (
    ENGINE_NAMES,
    MOCK_VARIABLE,
    OnlineMode,
    OnlineOptions,
    resolve_online,
)
from search_r1.search.recipes import EncoderSpec, add_recipe_arguments, read_recipe_flags
from search_r1.search.schema import MAX_TIMEOUT_S, MAX_TOPK
from serving.web.settings import (
    Parse,
    Setting,
    SettingError,
    Value,
    add_settings,
    expand_home,
    parse_choice,
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
_DEVICES: tuple[Device, ...] = ("cpu", "faiss_gpu", "torch")
_KIND_DECIDES = "the kind's own"


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseOptions:
    """A dense index, its corpus and its encoder."""

    index_path: Path
    corpus_path: Path
    encoder: EncoderSpec
    """What it does not state is read from the manifest of the index."""
    device: Device = "cpu"
    """Where the vectors are searched."""
    mmap: bool = True
    search: SearchOptions = field(default_factory=SearchOptions)
    num_threads: int | None = None
    """Of the whole process, for encoding and for search; None leaves it as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieverSettings:
    """Which retriever to open, and how."""

    name: str
    """Empty or a family of encoders for a dense index; or `bm25`, `hybrid`, an online engine."""
    dense: DenseOptions
    bm25_path: Path
    """Folder of the BM25 index."""
    hybrid_depth: int
    reranker_model: str
    """Empty: results are not reranked."""
    rerank_depth: int
    online: OnlineOptions

    @property
    def is_online(self) -> bool:
        """Return whether it asks another service; then no index is read."""
        return self.name in ENGINE_NAMES

    @property
    def files(self) -> list[str]:
        """Return what is loaded, for the log."""
        dense = self.dense
        files = [str(dense.corpus_path)]
        files += [] if self.name == BM25 else [str(dense.index_path), dense.encoder.path]
        files += [str(self.bm25_path)] if self.name in (BM25, HYBRID) else []
        return files + [self.reranker_model] * bool(self.reranker_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the retriever is served."""

    host: str
    port: int
    topk: int
    no_batching: bool
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
        """Return the size of the longest request body."""
        return int(self.max_body_mb * 2**20)


def _setting(
    name: str, default: str, parse: Parse, meaning: str, *, env: str = "", shown: str = ""
) -> Setting:
    return Setting(
        name=name,
        flag=f"--{name}",
        env=env or f"RETRIEVER_{name.upper()}",
        default=default,
        parse=parse,
        meaning=meaning,
        shown_default=shown,
    )


def _parse_optional_path(text: str) -> Value:
    return parse_path(text) if text else ""


def _parse_name(text: str) -> Value:
    if text.lower() == "bing":
        raise SettingError(
            f"{text!r}, whose API Microsoft retired in August 2025; expected serper, serpapi or google"
        )
    return text.lower()


def _optional(parse: Parse) -> Parse:
    """Return a parser that also accepts nothing."""
    return lambda text: parse(text) if text else ""


RETRIEVER_SETTINGS: tuple[Setting, ...] = (
    _setting(
        "retriever_name",
        "",
        _parse_name,
        "family of the encoder (e5, bge, gte, ...), or bm25, hybrid (dense and bm25), or an online engine: "
        + ", ".join(ENGINE_NAMES),
        env="RETRIEVER_NAME",
        shown="the family that the index was built with",
    ),
    _setting(
        "bm25_index_path",
        str(defaults.INDEX_DIR / "bm25"),
        parse_path,
        "folder of the BM25 index, for hybrid",
        env="BM25_INDEX_PATH",
        shown="world/index/bm25",
    ),
    _setting(
        "index_path",
        "",
        parse_path,
        "index: a Faiss file, or the folder of a BM25 index for bm25",
        env="INDEX_PATH",
        shown="world/index/e5_Flat.index",
    ),
    _setting(
        "corpus_path",
        str(defaults.CORPUS_PATH),
        parse_path,
        'passages: JSONL with {"id", "contents"} per line, or Arrow',
        env="CORPUS_PATH",
        shown="world/corpus.jsonl",
    ),
    _setting(
        "retriever_model",
        str(defaults.ENCODER_PATH),
        parse_path,
        "encoder: a folder or a hub id",
        env="RETRIEVER_MODEL",
        shown="world/models/encoder",
    ),
    _setting("faiss_gpu", "false", parse_switch, "search on all visible GPUs by a GPU build of Faiss"),
    _setting(
        "index_device",
        "",
        _optional(parse_choice(_DEVICES)),
        "where to search: cpu, faiss_gpu, or torch (exact, by torch on GPUs)",
        shown="cpu",
    ),
    _setting("no_mmap", "false", parse_switch, "read the index into memory instead of mapping its file"),
    _setting("nprobe", "0", parse_integer(0), "lists that ivf_pq searches", shown=_KIND_DECIDES),
    _setting(
        "ef_search",
        "0",
        parse_integer(0),
        "candidates that hnsw keeps while it searches",
        shown=_KIND_DECIDES,
    ),
    _setting("hybrid_depth", "100", parse_integer(1, MAX_TOPK), "passages of each part that hybrid joins"),
    _setting(
        "reranker_model",
        "",
        _parse_optional_path,
        "cross-encoder that reorders the passages: a folder or a hub id",
        shown="none",
    ),
    _setting("rerank_depth", "20", parse_integer(1, MAX_TOPK), "passages that the reranker reads"),
    _setting(
        "num_threads",
        "0",
        parse_integer(0, 4096),
        "for encoding and search on the CPU",
        shown="half of the cores: the trainer runs on the same machine",
    ),
)

ONLINE_SETTINGS: tuple[Setting, ...] = (
    _setting(
        "online_mode",
        "",
        _optional(parse_choice(OnlineMode)),
        "live: always ask; record: answer from --online_cache, else ask and record; replay: only from "
        "--online_cache, without any network",
        shown="record with --online_cache, else live",
    ),
    _setting(
        "online_cache", "", _parse_optional_path, "SQLite file of recorded answers and counted requests"
    ),
    _setting(
        "online_date",
        "",
        _optional(parse_text),
        "day of the recorded answers (YYYY-MM-DD), or any",
        shown="today for record, any for replay",
    ),
    _setting("online_url", "", _optional(parse_text), "ask a compatible service instead"),
    _setting("online_parallel", "16", parse_integer(1, 256), "connections, and requests at a time"),
    _setting(
        "max_online_requests",
        "",
        _optional(parse_integer(0)),
        "refuse to ask once --online_cache has counted so many requests",
    ),
    _setting(
        "mock_search",
        "false",
        parse_switch,
        "make all answers up, without network and key",
        env=MOCK_VARIABLE,
    ),
)

SERVER_SETTINGS: tuple[Setting, ...] = (
    _setting("host", "127.0.0.1", parse_text, "address to listen on; 0.0.0.0 for other machines"),
    _setting("port", "8000", parse_integer(0, 65535), "port to listen on; 0 takes a free one"),
    _setting(
        "topk", "3", parse_integer(1, MAX_TOPK), "passages per query where the request names none", env="TOPK"
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
        "how long accepted work may go on after SIGTERM",
    ),
    Setting(
        name="token",
        flag="--token_file",
        env="RETRIEVER_TOKEN",
        default="",
        parse=parse_token,
        meaning="bearer token that callers must present; the flag names a file that holds it",
        shown_default="none",
        parse_flag=read_token_file,
    ),
)


def add_retriever_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every retriever, for `resolve_retriever`."""
    add_settings(parser.add_argument_group("retriever"), RETRIEVER_SETTINGS)
    add_recipe_arguments(parser)
    add_settings(parser.add_argument_group("online engines"), ONLINE_SETTINGS)


def resolve_retriever(
    namespace: argparse.Namespace, *, environ: Mapping[str, str] | None = None
) -> RetrieverSettings:
    """Resolve the flags of `add_retriever_arguments`. Raises RetrieverError."""
    variables = os.environ if environ is None else environ
    values = _resolve(RETRIEVER_SETTINGS, namespace, environ=variables)
    name, device = str(values["retriever_name"]), str(values["index_device"]) or "cpu"
    if values["faiss_gpu"]:
        if values["index_device"] not in ("", "faiss_gpu"):
            raise RetrieverError(f"--faiss_gpu and --index_device {device} exclude each other; leave one out")
        device = "faiss_gpu"
    index_path = Path(str(values["index_path"]))
    dense = DenseOptions(
        index_path=index_path,
        corpus_path=Path(str(values["corpus_path"])),
        encoder=EncoderSpec(
            path=str(values["retriever_model"]),
            family=None if name in ("", HYBRID) else name,
            flags=read_recipe_flags(namespace),
        ),
        device=cast(Device, device),
        mmap=not values["no_mmap"],
        search=SearchOptions(
            nprobe=int(values["nprobe"]) or None, ef_search=int(values["ef_search"]) or None
        ),
        num_threads=int(values["num_threads"]) or max(1, len(os.sched_getaffinity(0)) // 2),
    )
    return RetrieverSettings(
        name=name,
        dense=dense,
        bm25_path=index_path if name == BM25 else Path(str(values["bm25_index_path"])),
        hybrid_depth=int(values["hybrid_depth"]),
        reranker_model=str(values["reranker_model"]),
        rerank_depth=int(values["rerank_depth"]),
        online=resolve_online(_resolve(ONLINE_SETTINGS, namespace, environ=variables), variables),
    )


def resolve_server(
    arguments: Sequence[str] = (), *, environ: Mapping[str, str] | None = None
) -> tuple[ServerSettings, RetrieverSettings]:
    """Resolve every setting. Raises RetrieverError; exits as argparse does on an unknown flag."""
    parser = argparse.ArgumentParser(
        prog="retrieval_server",
        description="Serve a retriever over HTTP. Without arguments: the embedded world. A flag overrides "
        "its variable.",
        allow_abbrev=False,
    )
    add_retriever_arguments(parser)
    add_settings(parser.add_argument_group("server"), SERVER_SETTINGS)
    namespace = parser.parse_args(expand_home(arguments))
    variables = os.environ if environ is None else environ
    values = _resolve(SERVER_SETTINGS, namespace, environ=variables)
    return ServerSettings(**values), resolve_retriever(namespace, environ=variables)  # type: ignore[arg-type]


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

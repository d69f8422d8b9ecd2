"""Serve a retriever over HTTP in the published wire format (see schema.py).

    python search_r1/search/retrieval_server.py --index_path e5_Flat.index --corpus_path wiki-18.jsonl
    curl -s localhost:8000/retrieve -H 'Content-Type: application/json' -d '{"query": "capital of France"}'

The port is taken first and the models are loaded behind it: `/livez` answers at once, `/readyz`, `/health`
and `/retrieve` say 503 until the retriever is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a file: Python then searches this folder, whose modules are not meant to be top-level ones.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from search_r1.search import defaults
from search_r1.search.errors import RetrieverError
from search_r1.search.retriever import BatchSearch, Hit
from search_r1.search.schema import MAX_TOPK, RetrieveRequest

logger = logging.getLogger(__name__)

_DRAIN_S = 5


class RetrieverHost:
    """Holds the retriever: loads it in the background, then searches in one thread off the event loop."""

    def __init__(self, load: Callable[[], BatchSearch]) -> None:
        self._load = load
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
        self._retriever: BatchSearch | None = None
        self.failure: RetrieverError | None = None

    @property
    def num_passages(self) -> int | None:
        """None until loaded."""
        return None if self._retriever is None else len(self._retriever)

    def start_loading(self, *, on_end: Callable[[], None]) -> None:
        """`on_end` is called from the loading thread, whether it went well or not (see `failure`)."""

        def run() -> None:
            try:
                self._retriever = self._load()
            except RetrieverError as error:
                self.failure = error
            finally:
                on_end()

        # A daemon, so that a stop signal need not wait for an index of gigabytes.
        threading.Thread(target=run, name="load", daemon=True).start()

    async def search(self, queries: Sequence[str], *, topk: int) -> list[list[Hit]]:
        """Only when `num_passages` is not None."""
        assert self._retriever is not None
        search = self._retriever.search
        return await asyncio.get_running_loop().run_in_executor(
            self._worker, lambda: search(queries, topk=topk)
        )

    def close(self) -> None:
        """Let the running search end, drop the waiting ones."""
        self._worker.shutdown(wait=True, cancel_futures=True)


def create_app(
    load: Callable[[], BatchSearch],
    *,
    topk: int = 3,
    on_loaded: Callable[[RetrieverHost], None] | None = None,
) -> FastAPI:
    """The service. `load` runs in a thread once the app starts; `topk` is the default of a request."""
    host = RetrieverHost(load)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        host.start_loading(on_end=lambda: on_loaded(host) if on_loaded else None)
        yield
        host.close()

    app = FastAPI(title="Retriever", lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def explain(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without the echoed input: it may be large, and need not be representable in JSON.
        problems = [{key: problem[key] for key in ("loc", "msg", "type")} for problem in error.errors()]
        return JSONResponse({"detail": problems}, status_code=422)

    @app.exception_handler(RetrieverError)
    async def report(_: Request, error: RetrieverError) -> JSONResponse:
        logger.error("search failed: %s", error)
        return JSONResponse({"detail": str(error)}, status_code=500)

    @app.middleware("http")
    async def check_loaded(
        request: Request, call_next: Callable[[Request], Awaitable[JSONResponse]]
    ) -> JSONResponse:
        if host.num_passages is None and request.url.path in ("/retrieve", "/readyz", "/health"):
            state = {"status": "loading", "detail": "the retriever is still loading"}
            return JSONResponse(state, status_code=503, headers={"Retry-After": "1"})
        return await call_next(request)

    @app.get("/livez")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "healthy", "passages": host.num_passages, "topk": topk}

    @app.post("/retrieve")
    async def retrieve(request: RetrieveRequest) -> JSONResponse:
        found = await host.search(request.texts, topk=request.topk or topk)
        return JSONResponse({"result": [_render(hits, with_scores=request.return_scores) for hits in found]})

    return app


def _render(hits: Sequence[Hit], *, with_scores: bool) -> list[dict[str, object]]:
    documents: list[dict[str, object]] = [
        {"id": hit.document.id, "contents": hit.document.contents} for hit in hits
    ]
    if not with_scores:
        return documents
    return [{"document": document, "score": hit.score} for document, hit in zip(documents, hits, strict=True)]


def serve(settings: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Exit status: 0 stopped, 1 bad files or a taken port."""
    started = time.monotonic()
    try:
        _check_files(settings)
        listener = _take_port(settings.host, settings.port)
    except RetrieverError as error:
        logger.error("%s", error)
        return 1
    url = f"http://{settings.host}:{listener.getsockname()[1]}"

    def load() -> BatchSearch:
        # Here, because torch and faiss take seconds to import and --help or a taken port need neither.
        from search_r1.search.dense import load_dense

        return load_dense(
            Path(settings.index_path),
            corpus_path=Path(settings.corpus_path),
            encoder_path=settings.retriever_model,
            retriever_name=settings.retriever_name,
            on_gpu=settings.faiss_gpu,
            num_threads=settings.num_threads,
        )

    def announce(host: RetrieverHost) -> None:
        if host.num_passages is None:
            logger.error("the retriever does not start: %s", host.failure or "loading crashed, see above")
            server.should_exit = True
            failed.set()
            return
        seconds = time.monotonic() - started
        logger.info("ready: %s/retrieve (%d passages, %.1f s)", url, host.num_passages, seconds)

    failed = threading.Event()
    app = create_app(load, topk=settings.topk, on_loaded=announce)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_DRAIN_S)
    )
    logger.info("loading %s, %s and %s", settings.corpus_path, settings.index_path, settings.retriever_model)
    with listener:
        server.run(sockets=[listener])
    return 1 if failed.is_set() else 0


def _check_files(settings: argparse.Namespace) -> None:
    """What can be seen without loading anything, so that a typo costs no waiting."""
    if not Path(settings.corpus_path).is_file():
        raise RetrieverError(f"--corpus_path {settings.corpus_path} is not a file; expected a JSONL file")
    if not Path(settings.index_path).is_file():
        fix = "build it with `bash search_r1/search/build_index.sh` (see its --help)"
        raise RetrieverError(f"--index_path {settings.index_path} is not a file; {fix}")
    model = Path(settings.retriever_model)
    if model.is_absolute() and not model.is_dir():  # a relative one may be a name in the hub cache
        raise RetrieverError(f"--retriever_model {model} is not a folder; expected a Hugging Face model")


def _take_port(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio asks: no 40 ms delays
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        fix = "stop what runs there, or choose another one with --port (and retriever.url in the training)"
        raise RetrieverError(f"cannot listen on {host}:{port} ({error.strerror}): {fix}") from error
    return listener


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="retrieval_server",
        description="Serve a dense index over HTTP. Without arguments: the embedded world.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--index_path", default=str(defaults.INDEX_PATH), help="Faiss index")
    add("--corpus_path", default=str(defaults.CORPUS_PATH), help='JSONL with {"id", "contents"} per line')
    add("--topk", default=3, type=int, help="passages per query where the request names no number")
    add("--retriever_name", default=defaults.RETRIEVER_NAME, help="encoder family: prefixes and pooling")
    add("--retriever_model", default=str(defaults.ENCODER_PATH), help="encoder: folder or cached model name")
    add("--faiss_gpu", action="store_true", help="search on all visible GPUs (needs a GPU build of Faiss)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    add("--port", default=8000, type=int, help="0 takes a free one")
    # Half of the cores: the trainer and its engines work next door, and waiting threads burn their time.
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    add("--num_threads", default=half, type=int, help="for encoding and search on the CPU")
    settings = parser.parse_args(arguments)
    if not 1 <= settings.topk <= MAX_TOPK:
        parser.error(f"--topk must be in 1..{MAX_TOPK}, got {settings.topk}")
    if settings.num_threads < 1:
        parser.error(f"--num_threads must be at least 1, got {settings.num_threads}")
    if not 0 <= settings.port <= 65535:
        parser.error(f"--port must be in 0..65535, got {settings.port}")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the flags, set up logging and stop signals, serve."""
    settings = _parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s retriever %(levelname)s %(message)s")
    for noisy in ("uvicorn", "uvicorn.error", "faiss", "faiss.loader", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # The server raises the signal again once it has drained: that is a wished-for end, not a death.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())

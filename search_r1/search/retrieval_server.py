"""Serve a retriever over HTTP in the published wire format (see schema.py).

    python search_r1/search/retrieval_server.py --index_path e5_Flat.index --corpus_path wiki-18.jsonl
    curl -s localhost:8000/retrieve -H 'Content-Type: application/json' -d '{"query": "capital of France"}'

The port is bound first and the retriever is loaded in the background: `/livez` answers at once, `/readyz`,
`/health` and `/retrieve` answer 503 until it is loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a file: Python then searches this folder, whose modules are not meant to be top-level ones.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import asyncio
import faulthandler
import gc
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from search_r1.search.answers import find_refusal, render_answer
from search_r1.search.assemble import check_files, open_retriever
from search_r1.search.batching import BatchOptions, MicroBatcher
from search_r1.search.errors import ChangedFileError, RetrieverError
from search_r1.search.pages import PageReader
from search_r1.search.retriever import Outcome, Retriever
from search_r1.search.schema import (
    BareAnswer,
    Page,
    PageAnswer,
    PageRequest,
    RetrieveRequest,
    ScoredAnswer,
)
from search_r1.search.server_metrics import RetrieverMetrics
from search_r1.search.settings import RetrieverSettings, ServerSettings, resolve_server
from serving.logs import configure_logging
from serving.machine import is_loopback
from serving.web.application import add_states, make_application, make_guarded_router, wait_for_disconnect
from serving.web.host import Host, UnavailableError
from serving.web.limits import Access, Admission, Guard, bounded_route
from serving.web.loading import is_loading
from serving.web.openapi import refusals
from serving.web.server import GracefulServer, exit_now, listen, url_of
from serving.web.version import package_version

logger = logging.getLogger("search_r1.search.retrieval_server")

_WORK_PATH, _PAGE_PATH = "/retrieve", "/page"
_TOKEN_VARIABLE = "RETRIEVER_TOKEN"
_MAX_PASSAGES = 50_000
"""Passages that one request may ask for, so that no answer fills the memory."""
_LARGE_ANSWER = 1000
"""Passages whose rendering takes so long that it is done beside the event loop."""

_DESCRIPTION = """
Give it queries, get the passages that fit best.

* Queries that arrive at about the same time are searched together, equal ones once.
* Without `allow_failures` a request fails when one of its queries does; with it that query's list is `null`
  and `errors` gives the reason. `null` is not an empty list, which means that nothing was found.
* When a caller disconnects, its queries leave the queue, unless other callers wait for them.
* 429 and 503 carry `Retry-After`, in seconds.
"""

_MEANINGS = {
    404: "There is no corpus to read pages from.",
    402: "The engine's quota or the limit of requests is used up: asking again does not help.",
    424: "A search engine refused, or a replay has no answer: asking again does not help.",
    500: "The search crashed.",
    502: "A search engine gave what cannot be read.",
    504: "Not answered in time.",
}


class HealthResponse(BaseModel):
    """State of the server."""

    status: Literal["healthy", "loading", "stopping", "unusable"]
    passages: int | None = Field(description="In the corpus; null when it is unknown.", examples=[21015324])
    topk: int = Field(description="Passages per query where the request names no number.", examples=[3])


class VersionResponse(BaseModel):
    """Everything that the answers depend on."""

    version: str = Field(description="Of this package; `unknown` where it is not installed.")
    topk: int = Field(examples=[3])
    passages: int | None = Field(description="Null until it is loaded, and when it is unknown.")
    retriever: dict[str, str | int | float | None] | None = Field(
        description="What was built and opened: names, hashes, parameters. Null until it is loaded."
    )


@dataclass(frozen=True, slots=True)
class Backend:
    """What does the work."""

    batcher: MicroBatcher
    pages: PageReader | None
    """None where there is no corpus to read from."""

    async def aclose(self) -> None:
        """Close both."""
        await self.batcher.aclose()
        if self.pages is not None:
            await self.pages.aclose()


def create_app(
    open_retriever: Callable[[], Awaitable[Retriever]],
    *,
    settings: ServerSettings | None = None,
    corpus_path: Path | None = None,
    on_ready: Callable[[Retriever], None] = lambda _: None,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Return the application; `open_retriever` is awaited in the background once it runs.

    `settings`: by default those of the server without any flag. `corpus_path`: what pages are read from; None
    where there is no corpus.
    """
    settings = settings or resolve_server(environ={})[0]

    async def start() -> Backend:
        options = BatchOptions(
            together=not settings.no_batching,
            max_batch=settings.max_batch,
            window_s=settings.batch_window_ms / 1000,
            cache_size=settings.cache_size,
        )
        batcher = MicroBatcher(await open_retriever(), options=options, counts=metrics)
        return Backend(batcher, None if corpus_path is None else PageReader(corpus_path))

    host: Host[Backend] = Host(
        start,
        admission=Admission(max_items=settings.max_queue, noun="queries"),
        not_loaded="Retriever not loaded",
    )
    metrics = RetrieverMetrics(
        in_progress=lambda: host.admission.num_held,
        waiting=lambda: host.backend.batcher.num_waiting if host.backend else 0,
    )
    app = make_application(
        host,
        title="Retriever",
        summary="Which passages of a corpus fit a query best?",
        description=_DESCRIPTION,
        on_ready=lambda backend: on_ready(backend.batcher.retriever),
        on_failure=on_failure,
    )

    def require_ready() -> None:
        if (defect := host.require_open().batcher.defect) is not None:
            raise UnavailableError(defect, retry_after_s=60)

    add_states(app, require_ready=require_ready)
    _add_health(app, host=host, settings=settings)
    access = Access(host=settings.host, token=settings.token, token_sources="--token_file or RETRIEVER_TOKEN")
    guarded = make_guarded_router(metrics.registry, access=access)
    _add_version(guarded, host=host, settings=settings)
    guarded.include_router(_work(host=host, metrics=metrics, settings=settings))
    app.include_router(guarded)
    app.add_middleware(
        Guard,
        work_paths={_WORK_PATH, _PAGE_PATH},
        access=access,
        max_body_bytes=settings.max_body_bytes,
        body_flag="--max_body_mb",
        noun="queries",
        metrics=metrics.requests,
    )
    return app


def _add_health(app: FastAPI, *, host: Host[Backend], settings: ServerSettings) -> None:
    @app.get(
        "/health",
        tags=["state"],
        response_model=HealthResponse,
        responses={
            503: {
                "model": HealthResponse,
                "description": "Loading, stopping, or a file was changed in place.",
            }
        },
    )
    async def health() -> Response:
        """Return the state of the server; 503 unless it answers searches."""
        status = "stopping" if host.draining else "loading" if host.backend is None else "healthy"
        if host.backend and host.backend.batcher.defect:
            status = "unusable"
        passages = host.backend.batcher.retriever.num_passages if host.backend else None
        body = {"status": status, "passages": passages, "topk": settings.topk}
        if status == "healthy":
            return JSONResponse(body)
        return JSONResponse(body, status_code=503, headers={"Retry-After": "1"})


def _add_version(router: APIRouter, *, host: Host[Backend], settings: ServerSettings) -> None:
    @router.get("/version", tags=["state"])
    async def version() -> VersionResponse:
        """Return everything that the answers depend on."""
        retriever = host.backend.batcher.retriever if host.backend else None
        return VersionResponse(
            version=package_version(),
            topk=settings.topk,
            passages=retriever.num_passages if retriever else None,
            retriever=dict(retriever.describe()) if retriever else None,
        )


def _work(*, host: Host[Backend], metrics: RetrieverMetrics, settings: ServerSettings) -> APIRouter:
    limits = {"--max_queries": settings.max_queries, "--max_queue": settings.max_queue}
    router = APIRouter(route_class=bounded_route(read=host.read, noun="queries", limits=limits))

    @router.post(
        _WORK_PATH,
        tags=["search"],
        response_model=ScoredAnswer | BareAnswer,
        responses=refusals(400, 402, 408, 413, 415, 424, 429, 500, 502, 503, 504, meanings=_MEANINGS),
    )
    async def retrieve(body: RetrieveRequest, request: Request) -> Response:
        """Return the best passages for every query, in order."""
        queries, topk = body.texts, body.topk or settings.topk
        if topk * len(queries) > _MAX_PASSAGES:
            raise HTTPException(
                413,
                f"the request asks for {topk} passages for each of {len(queries)} queries, expected at most "
                f"{_MAX_PASSAGES} together; split it",
            )
        timeout_s = body.timeout_s or settings.request_timeout_s

        async def search(backend: Backend) -> list[Outcome]:
            return await backend.batcher.search(queries, topk=topk, timeout_s=timeout_s)

        outcomes = await host.run(
            search, size=len(queries), disconnected=lambda: wait_for_disconnect(request)
        )
        metrics.count_outcomes(outcomes)
        if not body.allow_failures:
            _require_answered(outcomes, queries=queries)
        answer = await _render(outcomes, body=body)
        return Response(answer, media_type="application/json")

    @router.post(
        _PAGE_PATH,
        tags=["search"],
        responses=refusals(400, 404, 408, 413, 415, 429, 500, 503, meanings=_MEANINGS),
    )
    async def page(body: PageRequest, request: Request) -> PageAnswer:
        """Return a part of the page that a passage is on: all consecutive passages with its title."""

        async def read(backend: Backend) -> Page | None:
            if backend.pages is None:
                raise HTTPException(404, "no pages: an online engine has no corpus to read them from")
            try:
                return await backend.pages.read(body.id, part=body.part, part_chars=body.part_chars)
            except ChangedFileError as error:
                raise UnavailableError(str(error), retry_after_s=60) from error
            except RetrieverError as error:
                raise HTTPException(500, str(error)) from error

        found = await host.run(read, size=1, disconnected=lambda: wait_for_disconnect(request))
        return PageAnswer(page=found)

    return router


def _require_answered(outcomes: Sequence[Outcome], *, queries: Sequence[str]) -> None:
    """Raise HTTPException that names the first query without an answer."""
    refusal = find_refusal(outcomes, queries=queries)
    if refusal is None:
        return
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    raise HTTPException(refusal.status, refusal.detail, headers=headers)


async def _render(outcomes: Sequence[Outcome], *, body: RetrieveRequest) -> bytes:
    def render() -> bytes:
        return render_answer(outcomes, with_scores=body.return_scores, with_errors=body.allow_failures)

    num_passages = sum(len(outcome) for outcome in outcomes if isinstance(outcome, tuple))
    return render() if num_passages <= _LARGE_ANSWER else await asyncio.to_thread(render)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. Exit status: 0 stopped, 1 it could not start or load.

    Ends the process when it is stopped while it still loads, which cannot be interrupted.
    """
    configure_logging(
        "%(asctime)s retriever %(levelname)s %(message)s",
        quiet=("uvicorn", "uvicorn.error", "faiss", "faiss.loader", "httpx", "sentence_transformers"),
    )
    try:
        server, retriever = resolve_server(sys.argv[1:] if arguments is None else arguments)
        check_files(retriever)
        listener = listen(server.host, server.port, env="RETRIEVER_PORT")
    except (RetrieverError, OSError) as error:
        logger.error("%s", error)
        return 1
    os.environ.pop(_TOKEN_VARIABLE, None)  # so that child processes do not inherit it
    with listener:
        status = _serve(server, retriever, listener)
    gc.unfreeze()  # else a library warns of objects that are not collected at exit
    if is_loading():
        exit_now(status)
    return status


def _serve(settings: ServerSettings, opened: RetrieverSettings, listener: socket.socket) -> int:
    started = time.monotonic()
    url = url_of(settings.host, listener.getsockname()[1])

    def announce(retriever: Retriever) -> None:
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not scan it every time
        number = "?" if retriever.num_passages is None else f"{retriever.num_passages}"
        seconds = time.monotonic() - started
        logger.info("ready: %s%s (%s passages, %.1f s)", url, _WORK_PATH, number, seconds)

    app = create_app(
        lambda: open_retriever(opened),
        settings=settings,
        corpus_path=None if opened.is_online else opened.dense.corpus_path,
        on_ready=announce,
        on_failure=lambda: server.stop_at_once(),
    )
    host: Host[Backend] = app.state.host
    server = GracefulServer(app, host=host, grace_s=settings.shutdown_grace_s)
    if not settings.token and not is_loopback(settings.host):
        logger.warning(
            "any host that reaches %s may search; set %s or --token_file to require a token",
            url,
            _TOKEN_VARIABLE,
        )
    if opened.is_online:
        logger.info("opening %s", opened.name)
    else:
        logger.info("loading %s", ", ".join(opened.files))
    server.run_on(listener)
    error = host.start_error
    if isinstance(error, RetrieverError | OSError):
        logger.error("the retriever does not start: %s", error)
    elif error is not None:
        logger.error("the retriever does not start: %s: %s", type(error).__name__, error, exc_info=error)
    return 0 if error is None else 1


if __name__ == "__main__":
    faulthandler.enable()  # names the place of a crash, such as a read of a mapped file that was truncated
    sys.exit(main())

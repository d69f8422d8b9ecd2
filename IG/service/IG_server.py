"""The HTTP surface of the information-gain service, and its command line.

    python -m IG.service.IG_server --model-path Qwen/Qwen2.5-3B --port 8310

It listens at once and answers 503 to work until both models are loaded, in the background.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from IG.estimator import GainQuery
from IG.loading import is_loading
from IG.service import openapi
from IG.service.backend import Backend, PooledBackend
from IG.service.config import IGServiceConfig, SettingError, resolve_config, visible_device
from IG.service.lifecycle import Service, StartBackend, UnavailableError
from IG.service.limits import CallerLeftError, LimitBody, QueueFullError, RequireToken, bounded_route
from IG.service.metrics import CONTENT_TYPE, CountRequests, ServiceMetrics
from IG.service.models import ModelMissingError, require_models
from IG.service.rendering import render
from IG.service.schema import (
    HealthResponse,
    InfoGainRequest,
    InfoGainResponse,
    StateResponse,
    VersionResponse,
)
from IG.service.serving import GracefulServer, leave, listen

logger = logging.getLogger("IG.service")

_WORK_PATH = "/compute_info_gain"
_LOOPBACK = ("127.", "localhost", "::1")


def create_app(
    start_backend: StartBackend,
    *,
    config: IGServiceConfig,
    on_ready: Callable[[Backend], None] = lambda _: None,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application; `start_backend` is awaited in the background once it runs."""
    service = Service(
        start_backend,
        max_queued_items=config.max_queued_items,
        max_concurrent_requests=config.max_concurrent_requests,
    )
    metrics = ServiceMetrics(
        items_in_progress=lambda: service.admission.num_items, backend=lambda: service.backend
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.begin(on_ready=on_ready, on_failure=on_failure)
        yield
        await service.end()

    app = FastAPI(
        title="Information gain",
        summary="How much does a context help a frozen language model to believe in the right answer?",
        description=openapi.DESCRIPTION,
        version=package_version(),
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    for error, explain in _EXPLANATIONS.items():
        app.add_exception_handler(error, explain)
    _add_state(app, service=service)
    guarded = APIRouter(
        dependencies=openapi.security(needs_token=bool(config.token)), responses=openapi.refusals(401)
    )
    _add_reports(guarded, service=service, metrics=metrics, config=config)
    guarded.include_router(_work(service=service, metrics=metrics, config=config))
    app.include_router(guarded)
    # The last one added sees a request first.
    app.add_middleware(LimitBody, max_bytes=config.max_body_bytes)
    if config.token:
        app.add_middleware(RequireToken, token=config.token)
    app.add_middleware(CountRequests, metrics=metrics, path=_WORK_PATH)
    return app


def _add_state(app: FastAPI, *, service: Service) -> None:
    @app.get("/health", response_model_exclude_none=True, tags=["state"])
    async def health() -> HealthResponse:
        """State of the service; always 200."""
        return describe_health(service, version=app.version)

    @app.get("/livez", tags=["state"])
    async def livez() -> StateResponse:
        """The process runs."""
        return StateResponse(status="alive")

    @app.get("/readyz", tags=["state"], responses=openapi.refusals(503))
    async def readyz() -> StateResponse:
        """A worker can start on work; 503 when none can."""
        service.require_ready()
        return StateResponse(status="ready")


def _add_reports(
    router: APIRouter, *, service: Service, metrics: ServiceMetrics, config: IGServiceConfig
) -> None:
    @router.get("/version", tags=["state"])
    async def version() -> VersionResponse:
        """Everything that the numbers depend on."""
        identity = service.identity
        return VersionResponse(
            version=package_version(),
            generator=config.model_path,
            generator_digest=identity.generator_digest if identity else None,
            entailment=config.entailment_model,
            entailment_digest=identity.entailment_digest if identity else None,
            score=config.score,
            gain=config.gain,
            threshold=config.threshold,
            num_generations=config.num_generations,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            max_context_words=config.max_context_words,
            prompt_type=config.prompt_type,
            seed=config.seed,
        )

    @router.get("/metrics", tags=["state"], response_class=Response, responses=openapi.METRICS)
    async def read_metrics() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)


def _work(*, service: Service, metrics: ServiceMetrics, config: IGServiceConfig) -> APIRouter:
    def require_fitting(num_items: int) -> None:
        _require_fitting(num_items, config=config)

    router = APIRouter(route_class=bounded_route(read=service.read, require_fitting=require_fitting))

    @router.post(
        _WORK_PATH,
        tags=["gain"],
        response_model=InfoGainResponse,
        responses=openapi.refusals(400, 408, 413, 415, 422, 429, 503),
    )
    async def compute_info_gain(body: InfoGainRequest, request: Request) -> Response:
        """Gain of every item, in order; a failed item has a null score and its error."""
        queries = [
            GainQuery(question=item.question, context=item.context, golds=tuple(item.answers))
            for item in body.items
        ]

        async def caller_left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        estimates = await service.estimate(
            queries,
            details=body.include_details,
            timeout_s=body.timeout_s or config.request_timeout_s,
            caller_left=caller_left,
        )
        metrics.count_outcomes(estimates.outcomes, work=estimates.work)
        answer = await render(estimates, include_details=body.include_details)
        return Response(answer, media_type="application/json")

    return router


def describe_health(service: Service, *, version: str) -> HealthResponse:
    """What `GET /health` says, with the published words."""
    backend = service.backend
    if service.draining:
        return HealthResponse(status="unhealthy", message="Shutting down", version=version)
    if backend is None:
        return HealthResponse(status="unhealthy", message="Models not loaded", version=version)
    num_workers = len(backend.devices)
    if backend.failure is not None or backend.num_ready_workers == 0:
        return HealthResponse(
            status="unhealthy", message="No workers available", reason=backend.failure, version=version
        )
    if backend.num_ready_workers < num_workers:
        num_lost = num_workers - backend.num_ready_workers
        reason = f"{num_lost} of {num_workers} workers are being replaced or were given up"
        return HealthResponse(
            status="unhealthy", message="Some workers are unhealthy", reason=reason, version=version
        )
    on_cpus = backend.devices[0] == "cpu"
    if num_workers == 1:
        return HealthResponse(
            status="healthy",
            mode="single-CPU" if on_cpus else "single-GPU",
            device=backend.devices[0],
            version=version,
        )
    return HealthResponse(
        status="healthy",
        mode="multi-CPU" if on_cpus else "multi-GPU",
        num_workers=num_workers,
        devices=list(backend.devices),
        version=version,
    )


def package_version() -> str:
    """Of the installed distribution; `unknown` where this folder is used without installing it."""
    try:
        return importlib.metadata.version("inforeasoner")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _require_fitting(num_items: int, *, config: IGServiceConfig) -> None:
    """Raises HTTPException for a request that can never be accepted."""
    limit, flag = min((config.max_items, "--max-items"), (config.max_queued_items, "--max-queued-items"))
    if num_items > limit:
        raise HTTPException(
            413, f"the request has {num_items} items, expected at most {limit}; split it or raise {flag}"
        )


async def _explain_invalid(_: Request, error: Exception) -> JSONResponse:
    """Says where and why, without echoing the input: NaN or half a character is no JSON."""
    assert isinstance(error, RequestValidationError)
    problems = [{key: problem[key] for key in ("loc", "msg", "type")} for problem in error.errors()]
    return JSONResponse({"detail": problems}, status_code=422)


async def _explain_full(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QueueFullError)
    return _come_back(429, str(error), retry_after_s=error.retry_after_s)


async def _explain_unavailable(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UnavailableError)
    return _come_back(503, str(error), retry_after_s=error.retry_after_s)


async def _end_unanswered(_: Request, __: Exception) -> Response:
    """Nobody reads this."""
    return Response(status_code=499)


_EXPLANATIONS: dict[type[Exception], Any] = {
    RequestValidationError: _explain_invalid,
    QueueFullError: _explain_full,
    UnavailableError: _explain_unavailable,
    CallerLeftError: _end_unanswered,
}


def _come_back(status: int, message: str, *, retry_after_s: int) -> JSONResponse:
    headers = {"Retry-After": str(retry_after_s)}
    return JSONResponse({"detail": message}, status_code=status, headers=headers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service until it is told to stop. Exit status: 0 stopped, 1 it could not start or load.

    Ends the process by itself when it was stopped while a model still loads, which nothing can interrupt.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "uvicorn", "vllm"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        config = resolve_config(sys.argv[1:] if arguments is None else arguments)
        device = visible_device(config, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        require_models(config)
        listener = listen(config.host, config.port)
    except (SettingError, ModelMissingError, OSError) as error:
        logger.error("%s", error)
        return 1
    os.environ.pop("IG_TOKEN", None)  # what the workers inherit is none of their business
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    status = _serve(config, listener)
    if is_loading():
        leave(status)
    return status


def _serve(config: IGServiceConfig, listener: socket.socket) -> int:
    url = (
        f"http://[{config.host}]:{config.port}"
        if ":" in config.host
        else f"http://{config.host}:{config.port}"
    )

    def announce(backend: Backend) -> None:
        generator = f"generator {config.model_path}, entailment {config.entailment_model}"
        method = f"{config.score} score, gain by {config.gain}, {config.num_generations} samples"
        devices = ", ".join(backend.devices)
        logger.info("IG service ready at %s (%s, %s, on %s)", url, generator, method, devices)

    app = create_app(
        lambda: PooledBackend.start(replace(config, token="")),
        config=config,
        on_ready=announce,
        on_failure=lambda: server.stop_at_once(),
    )
    service: Service = app.state.service
    server = GracefulServer(app, service=service, grace_s=config.shutdown_grace_s)
    if not config.token and not config.host.startswith(_LOOPBACK):
        logger.warning(
            "anyone who reaches %s may use the service; IG_TOKEN or --token-file asks for a token", url
        )
    logger.info("IG service is loading its models; %s/readyz says when it is ready", url)
    server.run_on(listener)
    error = service.start_error
    if error is not None:
        logger.error("the models could not be loaded: %s: %s", type(error).__name__, error)
        return 1
    logger.info("IG service stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

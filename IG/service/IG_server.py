"""The HTTP surface of the information-gain service, and its command line.

    python -m IG.service.IG_server --model-path Qwen/Qwen2.5-3B --port 8310

It listens at once and answers 503 to work until both models are loaded, in the background.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from IG.config import (
    IGServiceConfig,
    count_gpus,
    require_devices,
    resolve_config,
    visible_device,
)
from IG.estimator import Estimates, FailureKind, GainFailure, GainQuery
from IG.judging import Judgements
from IG.semantics import gain_limit
from IG.service.backend import Backend, PooledBackend
from IG.service.metrics import ServiceMetrics
from IG.service.models import require_models
from IG.service.rendering import render, render_judgements
from IG.service.schema import (
    EntailmentRequest,
    EntailmentResponse,
    HealthResponse,
    InfoGainRequest,
    InfoGainResponse,
    Message,
    Mode,
    VersionResponse,
)
from IG.sharing import Work
from IG.wire import ENTAILMENT, GAINS
from serving.logs import configure_logging
from serving.machine import has_bfloat16, is_loopback
from serving.web.application import add_states, make_application, make_guarded_router, wait_for_disconnect
from serving.web.host import Host, UnavailableError
from serving.web.limits import Access, Admission, Guard, bounded_route
from serving.web.loading import is_loading
from serving.web.openapi import refusals
from serving.web.server import GracefulServer, exit_now, listen, url_of
from serving.web.version import package_version

logger = logging.getLogger("IG.service")

Done = TypeVar("Done", Estimates, Judgements)

_DESCRIPTION = """
The service samples short answers to a question with a context and without it, groups them by meaning, and
returns how much the belief in the accepted answers grew.

* `null` is not 0: an item that failed has a `null` score and its error; leave it out.
* The same item gets the same score alone and among others; what items have in common is done once.
* Entailment of pairs of texts is judged on request too, by the same model with the same limits.
* A caller that disconnects cancels work that no other caller waits for.
* 429 and 503 carry `Retry-After`, in seconds.
"""


def create_app(
    start_backend: Callable[[], Awaitable[Backend]],
    *,
    config: IGServiceConfig,
    on_ready: Callable[[Backend], None] = lambda _: None,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Build the application; `start_backend` is awaited in the background once it runs."""
    host: Host[Backend] = Host(
        start_backend,
        admission=Admission(max_items=config.max_queued_items, noun="items"),
        not_loaded="Models not loaded",
        require_usable=_require_usable,
    )
    metrics = ServiceMetrics(items_in_progress=lambda: host.admission.num_held, backend=lambda: host.backend)
    app = make_application(
        host,
        title="Information gain",
        summary="How much does a context help a frozen language model to believe in the right answer?",
        description=_DESCRIPTION,
        on_ready=on_ready,
        on_failure=on_failure,
    )

    def require_ready() -> None:
        if host.require_open().workers.num_ready == 0:
            raise UnavailableError("No workers available", retry_after_s=1)

    @app.get("/health", response_model_exclude_none=True, tags=["state"])
    async def health() -> HealthResponse:
        """Return the state of the service; always 200."""
        return describe_health(host, version=app.version)

    add_states(app, require_ready=require_ready)
    access = Access(host=config.host, token=config.token, token_sources="--token-file or IG_TOKEN")
    guarded = make_guarded_router(metrics.requests.registry, access=access)

    @guarded.get("/version", tags=["state"])
    async def version() -> VersionResponse:
        """Return everything that the numbers depend on."""
        identity = host.backend.identity if host.backend else None
        return VersionResponse.of(config, version=package_version(), identity=identity)

    turns = asyncio.Semaphore(config.max_concurrent_requests)
    guarded.include_router(_gains(host=host, metrics=metrics, config=config, turns=turns))
    guarded.include_router(_entailment(host=host, metrics=metrics, config=config, turns=turns))
    app.include_router(guarded)
    app.add_middleware(
        Guard,
        work_paths={GAINS.path, ENTAILMENT.path},
        access=access,
        max_body_bytes=config.max_body_bytes,
        body_flag="--max-body-mb",
        noun="items",
        metrics=metrics.requests,
    )
    return app


def _gains(
    *, host: Host[Backend], metrics: ServiceMetrics, config: IGServiceConfig, turns: asyncio.Semaphore
) -> APIRouter:
    router = _router(host, config, noun="items")

    @router.post(
        GAINS.path,
        tags=["gain"],
        response_model=InfoGainResponse,
        responses=refusals(400, 408, 413, 415, 429, 503),
    )
    async def compute_info_gain(body: InfoGainRequest, request: Request) -> Response:
        """Return gains in order; a failed item has a null score (`compat`: 0.0) and its error."""
        # The deadline counts from here: waiting for a turn is part of it.
        deadline = asyncio.get_running_loop().time() + (body.timeout_s or config.request_timeout_s)
        queries = [
            GainQuery(question=item.question, context=item.context, golds=tuple(item.answers))
            for item in body.items
        ]

        def fail_all(failure: GainFailure) -> Estimates:
            return Estimates(outcomes=[failure for _ in queries], work=Work(items=len(queries)))

        async def take_turn(backend: Backend) -> Estimates:
            return await _work_in_turn(
                lambda left_s: backend.estimate(queries, details=body.include_details, timeout_s=left_s),
                turns=turns,
                deadline=deadline,
                fail_all=fail_all,
            )

        estimates = await host.run(
            take_turn, size=len(queries), disconnected=lambda: wait_for_disconnect(request)
        )
        metrics.count_outcomes(estimates.outcomes, work=estimates.work)
        is_compatible = config.compat if body.compat is None else body.compat
        answer = await render(
            estimates,
            include_details=body.include_details,
            gain_limit=gain_limit(config.gain, num_samples=config.num_generations),
            failed_score=0.0 if is_compatible else None,
        )
        return Response(answer, media_type="application/json")

    return router


def _entailment(
    *, host: Host[Backend], metrics: ServiceMetrics, config: IGServiceConfig, turns: asyncio.Semaphore
) -> APIRouter:
    router = _router(host, config, noun="pairs")

    @router.post(
        ENTAILMENT.path,
        tags=["entailment"],
        response_model=EntailmentResponse,
        responses=refusals(400, 408, 413, 415, 429, 503),
    )
    async def judge_entailment(body: EntailmentRequest, request: Request) -> Response:
        """Return probabilities in order; a failed pair has null and its error."""
        deadline = asyncio.get_running_loop().time() + (body.timeout_s or config.request_timeout_s)
        pairs = [(pair.premise, pair.hypothesis) for pair in body.pairs]

        def fail_all(failure: GainFailure) -> Judgements:
            return Judgements(outcomes=[failure for _ in pairs], work=Work(items=len(pairs)))

        async def take_turn(backend: Backend) -> Judgements:
            return await _work_in_turn(
                lambda left_s: backend.judge(pairs, timeout_s=left_s),
                turns=turns,
                deadline=deadline,
                fail_all=fail_all,
            )

        judgements = await host.run(
            take_turn, size=len(pairs), disconnected=lambda: wait_for_disconnect(request)
        )
        metrics.count_outcomes(judgements.outcomes, work=judgements.work)
        answer = render_judgements(judgements)
        return Response(answer, media_type="application/json")

    return router


def _router(host: Host[Backend], config: IGServiceConfig, *, noun: str) -> APIRouter:
    """Return a router whose requests have a list `noun`, bounded by the settings."""
    limits = {"--max-items": config.max_items, "--max-queued-items": config.max_queued_items}
    return APIRouter(route_class=bounded_route(read=host.read, noun=noun, limits=limits))


async def _work_in_turn(
    do_work: Callable[[float], Awaitable[Done]],
    *,
    turns: asyncio.Semaphore,
    deadline: float,
    fail_all: Callable[[GainFailure], Done],
) -> Done:
    """Return what the work gives in the seconds that are left when its turn comes.

    What fails as a whole, or gets no turn in time, fails item by item.
    """
    try:
        async with asyncio.timeout_at(deadline):
            await turns.acquire()
    except TimeoutError:
        reason = "deadline: other requests were worked on until then"
        return fail_all(GainFailure(kind=FailureKind.deadline, reason=reason))
    try:
        return await do_work(max(deadline - asyncio.get_running_loop().time(), 0.0))
    except Exception as error:  # the request still gets an answer
        logger.exception("a request failed")
        return fail_all(GainFailure(kind=FailureKind.internal, reason=f"{type(error).__name__}: {error}"))
    finally:
        turns.release()


def _require_usable(backend: Backend) -> None:
    """Raise UnavailableError when no worker is left and none can be started.

    A worker that is being replaced is no reason to refuse: the work waits for it.
    """
    if (failure := backend.workers.failure) is not None:
        raise UnavailableError(failure, retry_after_s=10)


def describe_health(host: Host[Backend], *, version: str) -> HealthResponse:
    """Return the answer of `GET /health`, with the published words."""

    def unhealthy(message: Message, reason: str | None = None) -> HealthResponse:
        return HealthResponse(status="unhealthy", message=message, reason=reason, version=version)

    if host.draining:
        return unhealthy("Shutting down")
    if host.backend is None:
        return unhealthy("Models not loaded")
    workers = host.backend.workers
    num_workers = len(workers.devices)
    if workers.failure is not None or workers.num_ready == 0:
        return unhealthy("No workers available", workers.failure)
    if (num_lost := num_workers - workers.num_ready) > 0:
        reason = f"{num_lost} of {num_workers} workers are being replaced or could not be"
        return unhealthy("Some workers are unhealthy", reason)
    on_cpus = workers.devices[0] == "cpu"
    if num_workers == 1:
        mode: Mode = "single-CPU" if on_cpus else "single-GPU"
        return HealthResponse(status="healthy", mode=mode, device=workers.devices[0], version=version)
    return HealthResponse(
        status="healthy",
        mode="multi-CPU" if on_cpus else "multi-GPU",
        num_workers=num_workers,
        devices=list(workers.devices),
        version=version,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service until it is stopped. Exit status: 0 stopped, 1 it could not start or load.

    Exits the process itself when it is stopped while a model still loads, which nothing can interrupt.
    """
    configure_logging(
        "%(asctime)s %(levelname)s %(name)s: %(message)s",
        quiet=("httpx", "uvicorn", "vllm"),
        quiet_level=logging.ERROR,
    )
    try:
        config = resolve_config(sys.argv[1:] if arguments is None else arguments)
        device = visible_device(config, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        require_devices(config, count_gpus=count_gpus, has_bfloat16=has_bfloat16)
        require_models(config)
        listener = listen(config.host, config.port, env="IG_PORT")
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    os.environ.pop("IG_TOKEN", None)  # workers must not inherit it
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    status = _serve(config, listener)
    if is_loading():
        exit_now(status)
    return status


def _serve(config: IGServiceConfig, listener: socket.socket) -> int:
    url = url_of(config.host, config.port)

    def announce(backend: Backend) -> None:
        generator = f"generator {config.model_path}, entailment {config.entailment_model}"
        method = f"{config.score} score, gain by {config.gain}, {config.num_generations} samples"
        devices = ", ".join(backend.workers.devices)
        logger.info("IG service ready at %s (%s, %s, on %s)", url, generator, method, devices)

    app = create_app(
        lambda: PooledBackend.start(replace(config, token="")),
        config=config,
        on_ready=announce,
        on_failure=lambda: server.stop_at_once(),
    )
    host: Host[Backend] = app.state.host
    server = GracefulServer(app, host=host, grace_s=config.shutdown_grace_s)
    if not config.token and not is_loopback(config.host):
        logger.warning(
            "anyone who reaches %s may use the service; IG_TOKEN or --token-file asks for a token", url
        )
    logger.info("IG service is loading its models; %s/readyz says when it is ready", url)
    server.run_on(listener)
    error = host.start_error
    if error is not None:
        logger.error("the models could not be loaded: %s: %s", type(error).__name__, error)
        return 1
    logger.info("IG service stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

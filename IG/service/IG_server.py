"""The HTTP surface of the information-gain service, and its command line.

    python -m IG.service.IG_server --model-path Qwen/Qwen2.5-3B --port 8310

It listens at once and answers 503 to work until both models are loaded, in the background.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from IG.belief import Belief
from IG.estimator import GainEstimate, GainFailure, GainQuery
from IG.loading import is_loading
from IG.service.config import IGServiceConfig, SettingError, resolve_config, visible_device
from IG.service.IG_worker import Backend, LocalBackend, ModelMissingError, require_models
from IG.service.schema import (
    EntailmentDetail,
    HealthResponse,
    InfoGainDetail,
    InfoGainRequest,
    InfoGainResponse,
    ResponseDetail,
)

logger = logging.getLogger("IG.service")

StartBackend = Callable[[], Awaitable[Backend]]


class Service:
    """Holds the backend from its start to its end and limits how many requests use it at once."""

    def __init__(self, start_backend: StartBackend, *, max_concurrent_requests: int) -> None:
        self._start_backend = start_backend
        self._slots = asyncio.Semaphore(max_concurrent_requests)
        self._backend: Backend | None = None
        self._loading: asyncio.Task[None] | None = None
        self.start_error: BaseException | None = None

    def begin(self, *, on_ready: Callable[[Backend], None], on_failure: Callable[[], None]) -> None:
        """Load the models in the background."""
        self._loading = asyncio.create_task(self._load(on_ready=on_ready, on_failure=on_failure))

    async def end(self) -> None:
        """Stop loading, or free what was loaded."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._backend is not None:
            await self._backend.aclose()

    @property
    def obstacle(self) -> str | None:
        """Why no work can be done now; None when it can."""
        return "Models not loaded" if self._backend is None else self._backend.failure

    @property
    def device(self) -> str:
        """Where the models are; only asked when they are loaded."""
        assert self._backend is not None
        return self._backend.device

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool
    ) -> list[GainEstimate | GainFailure]:
        """Outcomes in order, when a slot is free."""
        async with self._slots:
            assert self._backend is not None
            return await self._backend.estimate(queries, details=details)

    async def _load(self, *, on_ready: Callable[[Backend], None], on_failure: Callable[[], None]) -> None:
        try:
            self._backend = await self._start_backend()
        except Exception as error:
            self.start_error = error
            on_failure()
        else:
            on_ready(self._backend)


def create_app(
    start_backend: StartBackend,
    *,
    max_concurrent_requests: int = 4,
    on_ready: Callable[[Backend], None] = lambda _: None,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application; `start_backend` is awaited in the background once it runs."""
    service = Service(start_backend, max_concurrent_requests=max_concurrent_requests)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.begin(on_ready=on_ready, on_failure=on_failure)
        yield
        await service.end()

    app = FastAPI(title="Information gain", description=__doc__ or "", lifespan=lifespan)
    app.state.service = service
    app.add_exception_handler(RequestValidationError, _explain)

    @app.get("/health", response_model_exclude_none=True)
    async def health() -> HealthResponse:
        """State of the service; always 200."""
        if service.obstacle is not None:
            return HealthResponse(status="unhealthy", message=service.obstacle)
        mode = "single-CPU" if service.device == "cpu" else "single-GPU"
        return HealthResponse(status="healthy", mode=mode, device=service.device)

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """The process runs."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Work can be done; 503 when not."""
        _require_ready(service)
        return {"status": "ready"}

    @app.post("/compute_info_gain")
    async def compute_info_gain(request: InfoGainRequest) -> InfoGainResponse:
        """Gain of every item, in order; a failed item has a null score and its error."""
        _require_ready(service)
        queries = [
            GainQuery(question=item.question, context=item.context, golds=tuple(item.answers))
            for item in request.items
        ]
        outcomes = await service.estimate(queries, details=request.include_details)
        return build_response(outcomes, include_details=request.include_details)

    return app


async def _explain(_: Request, error: Exception) -> JSONResponse:
    """A 422 that says where and why, without echoing the input: NaN or half a character is no JSON."""
    assert isinstance(error, RequestValidationError)
    problems = [{key: problem[key] for key in ("loc", "msg", "type")} for problem in error.errors()]
    return JSONResponse({"detail": problems}, status_code=422)


def build_response(
    outcomes: Sequence[GainEstimate | GainFailure], *, include_details: bool
) -> InfoGainResponse:
    """Outcomes in the published shape."""
    estimates = [outcome if isinstance(outcome, GainEstimate) else None for outcome in outcomes]
    return InfoGainResponse(
        scores=[estimate.gain if estimate else None for estimate in estimates],
        errors=[outcome.reason if isinstance(outcome, GainFailure) else None for outcome in outcomes],
        details=_details(estimates) if include_details and estimates else None,
    )


def _require_ready(service: Service) -> None:
    if service.obstacle is not None:
        raise HTTPException(status_code=503, detail=service.obstacle, headers={"Retry-After": "1"})


def _details(estimates: Sequence[GainEstimate | None]) -> list[InfoGainDetail | None]:
    return [None if estimate is None else _detail(estimate) for estimate in estimates]


def _detail(estimate: GainEstimate) -> InfoGainDetail:
    before, after = estimate.no_context, estimate.with_context
    assert before.full is not None
    assert after.full is not None
    return InfoGainDetail(
        with_context=_responses(after),
        no_context=_responses(before),
        entailment_with_context=_entailment(after),
        entailment_no_context=_entailment(before),
        clusters_with_context=after.full.clusters.tolist(),
        clusters_no_context=before.full.clusters.tolist(),
        score_with_context=after.score,
        score_no_context=before.score,
        semantic_entropy_with_context=after.full.semantic_entropy,
        semantic_entropy_no_context=before.full.semantic_entropy,
    )


def _responses(belief: Belief) -> list[ResponseDetail]:
    return [
        ResponseDetail(text=answer.text, mean_loglik=answer.mean_log_prob, length=answer.num_tokens)
        for answer in belief.answers
    ]


def _entailment(belief: Belief) -> EntailmentDetail:
    assert belief.full is not None
    forward, backward = belief.full.response_entails_gold, belief.full.gold_entails_response.T
    return EntailmentDetail(
        n_responses=forward.shape[0],
        n_answers=forward.shape[1],
        resp_entails_ans=forward.ravel().tolist(),
        ans_entails_resp=backward.ravel().tolist(),
    )


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
        listener = _listen(config)
    except (SettingError, ModelMissingError, OSError) as error:
        logger.error("%s", error)
        return 1
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    status = _serve(config, listener)
    if is_loading():
        _leave(status)
    return status


def _leave(status: int) -> NoReturn:
    """End now, with what the abandoned load may have started; without waiting for its thread."""
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    os._exit(status)


def _listen(config: IGServiceConfig) -> socket.socket:
    """Take the port before anything slow. Raises OSError with a message for the user."""
    where = f"{config.host}:{config.port}"
    try:
        address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(address[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
        listener.listen(2048)
    except PermissionError:
        raise OSError(f"{where}: ports below 1024 are not allowed here; choose another with --port") from None
    except OSError as error:
        raise OSError(
            f"cannot listen on {where} ({error.strerror or error}); stop what uses it, or choose another "
            "with --port or IG_PORT"
        ) from None
    return listener


def _serve(config: IGServiceConfig, listener: socket.socket) -> int:
    url = f"http://{config.host}:{config.port}"

    def announce(backend: Backend) -> None:
        generator = f"generator {config.model_path}, entailment {config.entailment_model}"
        method = f"{config.score} score, gain by {config.gain}, {config.num_generations} samples"
        logger.info("IG service ready at %s (%s, %s, on %s)", url, generator, method, backend.device)

    def give_up() -> None:
        server.should_exit = True

    app = create_app(
        lambda: LocalBackend.start(config),
        max_concurrent_requests=config.max_concurrent_requests,
        on_ready=announce,
        on_failure=give_up,
    )
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=10)
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn stops on them, then raises them again; being asked to stop is no failure.
        signal.signal(number, lambda *_: give_up())
    logger.info("IG service is loading its models; %s/readyz says when it is ready", url)
    server.run(sockets=[listener])
    error = app.state.service.start_error
    if error is not None:
        logger.error("the models could not be loaded: %s: %s", type(error).__name__, error)
        return 1
    logger.info("IG service stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

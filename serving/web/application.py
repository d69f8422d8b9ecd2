"""Build the application of a service: loading in the background, refusals with reasons, limits, states."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from serving.web.host import Backend, Host, UnavailableError
from serving.web.limits import CallerLeftError, LimitBody, QueueFullError, RequireToken, TrimSlash
from serving.web.metrics import CALLER_LEFT, CountRequests, RequestMetrics
from serving.web.openapi import StateResponse
from serving.web.version import package_version


def make_application(
    host: Host[Backend],
    *,
    title: str,
    summary: str,
    description: str,
    on_ready: Callable[[Backend], None],
    on_failure: Callable[[], None],
) -> FastAPI:
    """Return an application without routes, which starts and ends with its host."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        host.begin(on_ready=on_ready, on_failure=on_failure)
        yield
        await host.end()

    app = FastAPI(
        title=title,
        summary=summary,
        description=description,
        version=package_version(),
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to where the Host header points
    )
    app.state.host = host
    for error, explain in _EXPLANATIONS.items():
        app.add_exception_handler(error, explain)
    return app


def add_states(
    app: FastAPI, *, require_ready: Callable[[], object], responses: dict[int | str, dict[str, Any]]
) -> None:
    """Add the routes for process supervisors. `require_ready` may raise UnavailableError."""

    @app.get("/livez", tags=["state"])
    async def livez() -> StateResponse:
        """The process is running."""
        return StateResponse(status="alive")

    @app.get("/readyz", tags=["state"], responses=responses)
    async def readyz() -> StateResponse:
        """Work can start now; 503 if it cannot."""
        require_ready()
        return StateResponse(status="ready")


def add_guards(
    app: FastAPI,
    *,
    max_body_bytes: int,
    body_flag: str,
    noun: str,
    token: str,
    metrics: RequestMetrics,
    work_path: str,
) -> None:
    """Add what a request passes before its route: it is counted, its token is checked, its body limited."""
    # The one that is added last sees a request first.
    app.add_middleware(LimitBody, max_bytes=max_body_bytes, flag=body_flag, noun=noun)
    if token:
        app.add_middleware(RequireToken, token=token)
    app.add_middleware(CountRequests, metrics=metrics, path=work_path)
    app.add_middleware(TrimSlash)


async def wait_until_left(request: Request) -> None:
    """Return when the caller of a request hangs up. Its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _explain_invalid(_: Request, error: Exception) -> JSONResponse:
    """Say where and why, without repeating the input: NaN and lone surrogates are not JSON."""
    assert isinstance(error, RequestValidationError)
    problems = [{key: problem[key] for key in ("loc", "msg", "type")} for problem in error.errors()]
    return JSONResponse({"detail": problems}, status_code=422)


async def _explain_full(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QueueFullError)
    return _refuse_for_now(429, str(error), retry_after_s=error.retry_after_s)


async def _explain_unavailable(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UnavailableError)
    return _refuse_for_now(503, str(error), retry_after_s=error.retry_after_s)


async def _explain_left(_: Request, __: Exception) -> Response:
    """Return a response that is only counted, since the caller has hung up."""
    return Response(status_code=CALLER_LEFT)


_EXPLANATIONS: dict[type[Exception], Any] = {
    RequestValidationError: _explain_invalid,
    QueueFullError: _explain_full,
    UnavailableError: _explain_unavailable,
    CallerLeftError: _explain_left,
}


def _refuse_for_now(status: int, message: str, *, retry_after_s: int) -> JSONResponse:
    headers = {"Retry-After": str(retry_after_s)}
    return JSONResponse({"detail": message}, status_code=status, headers=headers)

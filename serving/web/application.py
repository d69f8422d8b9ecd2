"""Build the application of a service: loading in the background, refusals with reasons, limits, states."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serving.web.host import Backend, Host, UnavailableError
from serving.web.limits import Access, ClientDisconnectedError, QueueFullError
from serving.web.metrics import CLIENT_DISCONNECTED
from serving.web.openapi import StateResponse, refusals
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
        responses=refusals(403),  # `Guard` refuses on every path
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to where the Host header points
    )
    app.state.host = host
    for error, explain in _EXPLANATIONS.items():
        app.add_exception_handler(error, explain)
    return app


def add_states(app: FastAPI, *, require_ready: Callable[[], object]) -> None:
    """Add the routes for process supervisors. `require_ready` may raise UnavailableError."""

    @app.get("/livez", tags=["state"])
    async def livez() -> StateResponse:
        """Return 200 while the process runs."""
        return StateResponse(status="alive")

    @app.get("/readyz", tags=["state"], responses=refusals(503))
    async def readyz() -> StateResponse:
        """Return 200 when work can start now, else 503."""
        require_ready()
        return StateResponse(status="ready")


def make_guarded_router(registry: CollectorRegistry, *, access: Access) -> APIRouter:
    """Return the router of what needs the token, which `Guard` checks, with `GET /metrics` on it."""
    scheme = HTTPBearer(auto_error=False, description=access.token_sources)
    router = APIRouter(dependencies=[Security(scheme)] if access.token else [], responses=refusals(401))

    @router.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """Return the metrics in the text format of Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def wait_for_disconnect(request: Request) -> None:
    """Wait until the client of a request disconnects. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _explain_invalid(_: Request, error: Exception) -> JSONResponse:
    """Say where and why, without repeating the input: NaN and lone surrogates are not JSON."""
    assert isinstance(error, RequestValidationError)
    problems = [{key: problem[key] for key in ("loc", "msg", "type")} for problem in error.errors()]
    return JSONResponse({"detail": problems}, status_code=422)


async def _explain_for_now(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QueueFullError | UnavailableError)
    status = 429 if isinstance(error, QueueFullError) else 503
    headers = {"Retry-After": str(error.retry_after_s)}
    return JSONResponse({"detail": str(error)}, status_code=status, headers=headers)


async def _explain_disconnect(_: Request, __: Exception) -> Response:
    """Return a response that is only counted, since the client has disconnected."""
    return Response(status_code=CLIENT_DISCONNECTED)


_EXPLANATIONS: dict[type[Exception], Any] = {
    RequestValidationError: _explain_invalid,
    QueueFullError: _explain_for_now,
    UnavailableError: _explain_for_now,
    ClientDisconnectedError: _explain_disconnect,
}

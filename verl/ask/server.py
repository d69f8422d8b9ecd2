"""Serve an agent over HTTP as an OpenAI-compatible endpoint, with a page to watch an episode."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from serving.web.application import add_states, make_application, make_guarded_router, wait_for_disconnect
from serving.web.host import Host, UnavailableError
from serving.web.limits import OPEN_PATHS, Access, Admission, ClientDisconnectedError, Guard, bounded_route
from serving.web.metrics import RequestMetrics
from serving.web.openapi import refusals
from verl.ask.asker import Asker, AskSettings
from verl.ask.openai_errors import DEFECT, MODEL_NOT_FOUND, TOO_LONG, OpenAIErrors, describe
from verl.ask.openai_wire import ChatRequest, Writer
from verl.ask.page import make_page
from verl.ask.settings import ServerSettings
from verl.ask.trace import Episode, Step
from verl.types import Stop, Trajectory

logger = logging.getLogger(__name__)

CHAT_PATH, PAGE_PATH = "/v1/chat/completions", "/"
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_DESCRIPTION = """
Ask a question: the agent behind it searches, reads and answers.

* The last message of the user is the question; the agent was trained on single questions and reads no others.
* `choices[].message.search_trace` holds its turns: thoughts, tool calls, passages. In a stream
  `choices[].delta.search_trace` has each turn when it is sampled, and again with the reply to it.
* An episode ends when its client disconnects.
"""


class HealthResponse(BaseModel):
    """State of the server."""

    status: Literal["healthy", "loading", "stopping"]
    model: str


def create_app(
    start: Callable[[], Awaitable[Asker]],
    *,
    model: str,
    settings: ServerSettings,
    defaults: AskSettings,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Return the application; `start` is awaited in the background once it runs.

    `model` is the name under which it answers, `defaults` are for requests that say nothing of their own.
    """
    host: Host[Asker] = Host(
        start,
        admission=Admission(max_items=settings.max_questions, noun="questions"),
        not_loaded="The model is not loaded",
    )
    app = make_application(
        host,
        title="Ask",
        summary="What does the agent answer?",
        description=_DESCRIPTION,
        on_ready=lambda _: on_ready(),
        on_failure=on_failure,
    )
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry, prefix="ask", purpose="answers", buckets=_SECONDS)
    add_states(app, require_ready=host.require_open)
    _add_health(app, host=host, model=model)
    _add_page(app)
    access = Access(
        host=settings.host,
        token=settings.token,
        token_sources="--token-file or ASK_TOKEN",
        open_paths={*OPEN_PATHS, PAGE_PATH},  # the page asks for the token
    )
    guarded = make_guarded_router(registry, access=access)
    _add_models(guarded, model=model)
    guarded.include_router(_work(host=host, model=model, settings=settings, defaults=defaults))
    app.include_router(guarded)
    app.add_middleware(
        Guard,
        work_paths={CHAT_PATH},
        access=access,
        max_body_bytes=int(settings.max_body_mb * 2**20),
        body_flag="--max-body-mb",
        noun="messages",
        metrics=metrics,
    )
    app.add_middleware(OpenAIErrors)
    return app


def _add_health(app: FastAPI, *, host: Host[Asker], model: str) -> None:
    @app.get("/health", tags=["state"], response_model=HealthResponse)
    async def health() -> Response:
        """Return the state of the server; 503 unless it answers questions."""
        status = "stopping" if host.draining else "loading" if host.backend is None else "healthy"
        code = 200 if status == "healthy" else 503
        return JSONResponse({"status": status, "model": model}, status_code=code)


def _add_page(app: FastAPI) -> None:
    page = make_page()

    @app.get(PAGE_PATH, response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page.html, headers=page.headers)


def _add_models(router: APIRouter, *, model: str) -> None:
    described = {"id": model, "object": "model", "created": 0, "owned_by": "local"}

    @router.get("/v1/models", tags=["ask"])
    async def list_models() -> dict[str, Any]:
        """Return the one model that answers."""
        return {"object": "list", "data": [described]}


def _work(*, host: Host[Asker], model: str, settings: ServerSettings, defaults: AskSettings) -> APIRouter:
    limits = {"--max-messages": settings.max_messages}
    router = APIRouter(route_class=bounded_route(read=host.read, noun="messages", limits=limits))

    @router.post(
        CHAT_PATH, tags=["ask"], response_model=None, responses=refusals(400, 408, 413, 415, 429, 503)
    )
    async def complete(body: ChatRequest, request: Request) -> Response:
        """Return the answer to the last message of the user, whole or as a stream."""
        if body.model != model:
            raise _refusal(404, f"model {body.model!r} is not here, expected {model!r}", code=MODEL_NOT_FOUND)
        if (problem := host.require_open().find_problem(body.question)) is not None:
            raise _refusal(400, problem, code=TOO_LONG)
        asked = _settings_of(body, defaults)
        writer = Writer(model)
        if body.stream:
            episode = _Running(host, body.question, asked, request)
            await episode.wait_for_first()
            includes_usage = body.stream_options is not None and body.stream_options.include_usage
            events = episode.events(writer, includes_usage=includes_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=_NO_CACHE)
        done = await host.run(
            lambda asker: asker.ask(body.question, settings=asked),
            size=1,
            disconnected=lambda: wait_for_disconnect(request),
        )
        if done.trajectory.stop is Stop.FAILED:
            raise _refusal(502, explain_failure(done), code="episode_failed")
        return JSONResponse(writer.completion(done))

    return router


_NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _settings_of(body: ChatRequest, defaults: AskSettings) -> AskSettings:
    return AskSettings(
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        max_turns=body.max_turns or defaults.max_turns,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        seed=body.seed,
    )


def _refusal(status: int, message: str, *, code: str) -> HTTPException:
    return HTTPException(status, {"message": message, "code": code})


def explain_failure(episode: Episode) -> str:
    """Return why an episode failed."""
    return episode.trajectory.failure or ""


class _Running:
    """An episode that runs while its turns are sent."""

    def __init__(self, host: Host[Asker], question: str, settings: AskSettings, request: Request) -> None:
        self._steps: asyncio.Queue[Step | str | None] = asyncio.Queue()
        """Turns, then the answer if there is one; None ends them."""
        self._first: Step | str | None = None
        self._work = asyncio.create_task(
            host.run(
                lambda asker: asker.ask(
                    question, settings=settings, on_step=self._steps.put_nowait, on_end=self._put_answer
                ),
                size=1,
                disconnected=lambda: wait_for_disconnect(request),
            )
        )
        self._work.add_done_callback(lambda _: self._steps.put_nowait(None))

    def _put_answer(self, trajectory: Trajectory) -> None:
        if trajectory.answer is not None:
            self._steps.put_nowait(trajectory.answer)

    async def wait_for_first(self) -> None:
        """Wait for the first turn. Raises why there is none: then it can still be answered with a status."""
        try:
            self._first = await self._steps.get()
            if self._first is None:
                await self._raise_failure()
        except BaseException:
            self._work.cancel()
            raise

    async def _raise_failure(self) -> None:
        episode = await self._work
        if episode.trajectory.stop is Stop.FAILED:
            raise _refusal(502, explain_failure(episode), code="episode_failed")

    async def events(self, writer: Writer, *, includes_usage: bool) -> AsyncIterator[str]:
        """Yield the events of the stream. The episode ends with it."""
        try:
            yield _event(writer.start())
            step = self._first
            while step is not None:
                yield _event(writer.answer(step) if isinstance(step, str) else writer.step(step))
                step = await self._steps.get()
            try:
                episode = await self._work
            except (UnavailableError, ClientDisconnectedError) as error:  # the status is sent already
                logger.warning("a stream broke: %s", error)
                yield _event(describe(503, str(error)))
                return
            except Exception:
                logger.exception("a stream failed")
                yield _event(describe(500, DEFECT))
                return
            if episode.trajectory.stop is Stop.FAILED:
                yield _event(describe(502, explain_failure(episode), code="episode_failed"))
                return
            for chunk in writer.end(episode):
                yield _event(chunk)
            if includes_usage:
                yield _event(writer.usage(episode))
            yield "data: [DONE]\n\n"
        finally:
            self._work.cancel()
            with suppress(BaseException):
                await self._work


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"

"""Small stand-ins for the seams, shared by all tests: each does one thing and keeps what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from verl.types import Action, ActionKind, Message, Passage, Question, Stop, Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted HTTP answer; `delay_s` before it, or `hangs_up` instead of it."""

    body: str = "{}"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.0
    hangs_up: bool = False


@dataclass(slots=True)
class ScriptedServer:
    """A real HTTP server on a free port that plays its script, the last reply for ever; records requests."""

    script: list[Reply]
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Request line, headers in lower case, body."""
    url: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ScriptedServer]:
        server = await asyncio.start_server(self._play, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield self
        server.close()

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append((head[0], headers, body))
        reply = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        await asyncio.sleep(reply.delay_s)
        if not reply.hangs_up:
            text = reply.body.encode()
            extra = "".join(f"{name}: {value}\r\n" for name, value in reply.headers)
            start = f"HTTP/1.1 {reply.status} scripted\r\nContent-Length: {len(text)}\r\n{extra}"
            writer.write(f"{start}Connection: close\r\n\r\n".encode() + text)
        writer.close()


def make_question(
    uid: str = "nq/test/0", *, golds: tuple[str, ...] = ("Bolton",), text: str = ""
) -> Question:
    """A question whose data source is the first part of its uid."""
    text = text or f"Question {uid}?"
    return Question(
        uid=uid,
        text=text,
        messages=(Message(role="user", content=text),),
        golds=golds,
        data_source=uid.split("/")[0],
    )


def make_turn(
    kind: ActionKind,
    text: str = "",
    *,
    titles: tuple[str, ...] = (),
    outputs: int = 4,
    observed: int = 0,
    log_prob: float = -0.5,
) -> Turn:
    """A turn of `outputs` sampled and `observed` injected tokens; one passage per title."""
    return Turn(
        output_ids=np.arange(outputs, dtype=np.int32),
        output_log_probs=np.full(outputs, log_prob, np.float32),
        action=Action(kind=kind, text=text),
        passages=tuple(Passage(id=t, title=t, text=f"About {t}.", score=1.0) for t in titles),
        observation_ids=np.arange(observed, dtype=np.int32),
    )


def make_trajectory(
    question: Question,
    *,
    sample: int = 0,
    queries: tuple[str, ...] = (),
    answer: str | None = None,
    failure: str | None = None,
    outputs: int = 4,
    observed: int = 5,
) -> Trajectory:
    """Search every query (one passage each, titled like it), then answer; no answer means stop BUDGET."""
    turns = [
        make_turn(ActionKind.SEARCH, q, titles=(q,), outputs=outputs, observed=observed) for q in queries
    ]
    if answer is not None:
        turns.append(make_turn(ActionKind.ANSWER, answer, outputs=outputs))
    stop = Stop.FAILED if failure else Stop.BUDGET if answer is None else Stop.ANSWERED
    return Trajectory(
        question=question,
        sample=sample,
        prompt_ids=np.arange(3, dtype=np.int32),
        turns=tuple(turns),
        stop=stop,
        failure=failure,
        seconds=0.5,
    )

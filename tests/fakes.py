"""Small implementations of the seams, shared by all tests: each does one thing and keeps its calls."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from verl.protocols import Page
from verl.types import (
    Action,
    ActionKind,
    Completion,
    Finish,
    IntArray,
    Message,
    Observation,
    Passage,
    Question,
    Sampling,
    Span,
    SpanKind,
    Stop,
    ToolCall,
    Trajectory,
    Turn,
)

if TYPE_CHECKING:
    from IG.sampler import SampledAnswer


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP answer; `delay_s` before it, or `hangs_up` instead of it."""

    body: str | bytes = "{}"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.0
    hangs_up: bool = False


@dataclass(slots=True, kw_only=True)
class FakeServer:
    """A real HTTP server on a free port that keeps what it is sent; `reply` is what a kind of it answers."""

    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Request line, headers in lower case, body."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    """Of the requests, on the clock of `time.perf_counter`."""
    num_abandoned: int = 0
    """Requests whose caller disconnected before the answer."""
    url: str = ""

    def reply(self, body: bytes) -> Reply:
        raise NotImplementedError

    @asynccontextmanager
    async def running(self, *, port: int = 0) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield self
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append((head[0], headers, body))
        self.arrivals.append(time.perf_counter())
        reply = self.reply(body)
        with suppress(TimeoutError):
            async with asyncio.timeout(reply.delay_s):
                await reader.read(1)  # returns early only if the caller disconnects
                self.num_abandoned += 1
        if not reply.hangs_up:
            content = reply.body if isinstance(reply.body, bytes) else reply.body.encode()
            extra = "".join(f"{name}: {value}\r\n" for name, value in reply.headers)
            start = f"HTTP/1.1 {reply.status} fake\r\nContent-Length: {len(content)}\r\n{extra}"
            writer.write(f"{start}Connection: close\r\n\r\n".encode() + content)
        writer.close()


@dataclass(slots=True)
class ScriptedServer(FakeServer):
    """Plays its script, the last reply without end."""

    script: list[Reply]

    def reply(self, body: bytes) -> Reply:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


@dataclass(slots=True)
class AnsweringServer(FakeServer):
    """Answers as `answer` decides from the JSON it is sent."""

    answer: Callable[[dict[str, Any]], Reply]

    def reply(self, body: bytes) -> Reply:
        self.bodies.append(json.loads(body))
        return self.answer(self.bodies[-1])


@dataclass(slots=True)
class FakeGainService(FakeServer):
    """After `delay_s` every item gets a gain made of its texts."""

    delay_s: float = 0.0
    max_items: int = 1000
    work: Mapping[str, int] | None = None

    @staticmethod
    def gain(question: str, context: str) -> float:
        return zlib.crc32(f"{question}|{context}".encode()) / 2**32 if context else 0.0

    @property
    def items(self) -> list[tuple[str, str]]:
        """(question, context) of all items, in order."""
        return [(item["question"], item["context"]) for body in self.bodies for item in body["items"]]

    def reply(self, body: bytes) -> Reply:
        self.bodies.append(json.loads(body))
        items = self.bodies[-1]["items"]
        if len(items) > self.max_items:
            return Reply(status=413, delay_s=self.delay_s)
        scores = [self.gain(item["question"], item["context"]) for item in items]
        answer: dict[str, object] = {"scores": scores, "errors": [None] * len(scores), "details": None}
        if self.work is not None:
            answer["work"] = self.work
        return Reply(json.dumps(answer, allow_nan=False), delay_s=self.delay_s)


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


def make_action(kind: ActionKind, text: str = "", *, start: int = 0, end: int = 0) -> Action:
    """An action with one span; a tool call is a search for `text`."""
    is_call = kind is ActionKind.TOOL
    span = Span(kind=SpanKind.QUERY if is_call else SpanKind.ANSWER, start=start, end=end, text=text)
    return Action(
        kind=kind,
        calls=(ToolCall(tool="search", arguments={"query": text}),) if is_call else (),
        spans=() if kind is ActionKind.INVALID else (span,),
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
    is_call = kind is ActionKind.TOOL
    passages = tuple(Passage(id=t, title=t, text=f"About {t}.", score=1.0) for t in titles)
    return Turn(
        output_ids=np.arange(outputs, dtype=np.int32),
        output_log_probs=np.full(outputs, log_prob, np.float32),
        action=make_action(kind, text),
        observations=(Observation(passages=passages),) if is_call and observed else (),
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
    turns = [make_turn(ActionKind.TOOL, q, titles=(q,), outputs=outputs, observed=observed) for q in queries]
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


def tiny_model(folder: Path, *, tied: bool = False, vocab_size: int = 97, seed: int = 0) -> Path:
    """A random two-layer Qwen2 in float32 as a Hugging Face folder, without a tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def make_tied_model(folder: Path) -> Path:
    """A random tied model with heads as large as the CPU engine needs them, and the policy's tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    policy = Path(__file__).resolve().parents[1] / "world" / "models" / "policy"
    config = Qwen2Config(
        vocab_size=json.loads((policy / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    for file in policy.glob("*"):
        if file.name.startswith(("tokenizer", "chat_template")):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


class CharTokenizer:
    """One token per character: the id is the code point. Implements `verl.protocols.Tokenizer`."""

    control: Mapping[int, str] = MappingProxyType({})

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def render_prompt(self, question: Question) -> list[int]:
        return self.encode(question.messages[0].content)

    def render_next_turn(
        self, text: str, *, role: str = "user", after: Sequence[int] = ()
    ) -> list[int] | None:
        return None


class ChatTokenizer(CharTokenizer):
    """Ends turns with `$`."""

    control: Mapping[int, str] = MappingProxyType({ord("$"): "$"})

    def render_next_turn(
        self, text: str, *, role: str = "user", after: Sequence[int] = ()
    ) -> list[int] | None:
        return self.encode(f"{'' if after and chr(after[-1]) == '$' else '$'}{role[0]}:{text}$A:")


class PieceTokenizer(CharTokenizer):
    """Decodes positions of a list of pieces."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[i] for i in ids)


@dataclass(slots=True)
class ScriptedGenerate:
    """Samples the scripted ids in turn, raises scripted errors; keeps contexts and samplings."""

    script: list[Sequence[int] | Exception]
    version: int = 0
    finish: Finish = Finish.STOP
    contexts: list[list[int]] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        reply = self.script[len(self.contexts)]
        self.contexts.append(list(map(int, prompt_ids)))
        self.samplings.append(sampling)
        await asyncio.sleep(0)
        if isinstance(reply, Exception):
            raise reply
        return Completion(
            ids=np.array(reply, np.int32),
            log_probs=np.linspace(-2, -1, len(reply), dtype=np.float32),
            finish=self.finish,
            version=self.version,
        )


@dataclass(slots=True)
class ScriptedSearch:
    """Finds what is scripted for a query, nothing for others; keeps the queries and counts other calls."""

    found: dict[str, tuple[Passage, ...] | Exception] = field(default_factory=dict)
    queries: list[str] = field(default_factory=list)
    pages: dict[str, tuple[Passage, ...]] = field(default_factory=dict)
    """Of one part each, by id; a part of any other number has no passages."""
    num_waits: int = 0
    num_closes: int = 0

    async def open_page(self, page_id: str, *, part: int, part_chars: int, timeout_s: float) -> Page | None:
        self.queries.append(f"{page_id} {part}")
        if page_id not in self.pages:
            return None
        pieces = self.pages[page_id]
        return Page(title=pieces[0].title, part=part, num_parts=1, passages=pieces if part == 1 else ())

    async def search(self, query: str) -> tuple[Passage, ...]:
        self.queries.append(query)
        await asyncio.sleep(0)
        found = self.found.get(query, ())
        if isinstance(found, Exception):
            raise found
        return found

    async def wait_ready(self, timeout_s: float) -> None:
        self.num_waits += 1

    async def describe(self) -> dict[str, object] | None:
        return None

    async def aclose(self) -> None:
        self.num_closes += 1


@dataclass(slots=True)
class FakeAgent:
    """Answers at once; `delays_s` and `failures` by question uid; keeps (uid, sample, seed, greedy)."""

    delays_s: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, int, int, bool]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        self.asked.append((question.uid, sample, seed, greedy))
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        await asyncio.sleep(self.delays_s.get(question.uid, 0.0))
        self.num_running -= 1
        self.finished.append(question.uid)
        return make_trajectory(question, sample=sample, answer="a", failure=self.failures.get(question.uid))


@dataclass(slots=True)
class FakeAnswerSampler:
    """Answers by a part of the prompt, all equally likely; an exception is raised."""

    answers: Mapping[str, Sequence[str] | Exception]
    default: Sequence[str] = ("nothing",)
    pause_s: float = 0.0
    prompts: list[str] = field(default_factory=list)

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        from IG.sampler import SampledAnswer

        self.prompts.append(prompt)
        await asyncio.sleep(self.pause_s)
        texts = next((texts for key, texts in self.answers.items() if key in prompt), self.default)
        if isinstance(texts, Exception):
            raise texts
        return tuple(SampledAnswer(text=text, mean_log_prob=-1.0, num_tokens=1) for text in texts)


@dataclass(slots=True)
class FakeEntailment:
    """Pairs of equal last words entail with 0.9, `pairs` with what they say, all others with 0.1."""

    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)
    batches: list[list[tuple[str, str]]] = field(default_factory=list)

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        self.batches.append(list(pairs))
        return np.asarray(
            [
                self.pairs.get(pair, 0.9 if pair[0].split()[-1] == pair[1].split()[-1] else 0.1)
                for pair in pairs
            ]
        )


@dataclass(slots=True)
class FakePairJudge:
    """Judges as `model` does, a batch for each call, after a pause."""

    model: FakeEntailment = field(default_factory=FakeEntailment)
    pause_s: float = 0.0

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | Exception]:
        await asyncio.sleep(self.pause_s)
        judged: list[float | Exception] = self.model.probabilities(pairs).tolist()
        return judged

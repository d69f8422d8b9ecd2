"""The wire formats of the search engines: what to send, how to read the answer, what a refusal means.

Documented by the engines: serper.dev, serpapi.com/search-api, and Google's Custom Search JSON API. Pages of
ten everywhere, so that one request is one billed query.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from search_r1.search.retriever import FailureKind
from search_r1.search.schema import Document
from serving.encoding import replace_surrogates

PAGE_SIZE = 10
MAX_RESULTS = 100
"""Google gives no more for any query; the others are not asked for more."""
MAX_QUERY_CHARS = 2048
"""Every engine refuses longer ones, and some would bill the refusal."""
_MAX_QUOTED_CHARS = 300

Body = Mapping[str, object]


class EngineError(Exception):
    """The engine gave no answer to this query."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request without its keys, which are added below everything that logs."""

    params: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, str | int] | None = None
    """Sent by POST as JSON; None is a GET."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One search engine."""

    name: str
    url: str
    key_params: Mapping[str, str] = field(default_factory=dict)
    """URL parameters that carry a key, each with the environment variable it is read from."""
    key_headers: Mapping[str, str] = field(default_factory=dict)
    """The same for headers."""
    make_call: Callable[[str, int], Call]
    """From a query and the position of the first result, a multiple of PAGE_SIZE."""
    results_key: str
    """Of the list of results in an answer."""
    is_answer: Callable[[Body], bool]
    """Whether an answer without results states that there are none."""

    @property
    def key_variables(self) -> tuple[str, ...]:
        """Return the environment variables of its keys."""
        return (*self.key_params.values(), *self.key_headers.values())


def _serper(query: str, start: int) -> Call:
    return Call(body={"q": query, "num": PAGE_SIZE, "page": 1 + start // PAGE_SIZE})


def _serpapi(query: str, start: int) -> Call:
    return Call(params={"engine": "google", "q": query, "num": str(PAGE_SIZE), "start": str(start)})


def _serpapi_succeeded(body: Body) -> bool:
    metadata = body.get("search_metadata")
    return isinstance(metadata, Mapping) and metadata.get("status") == "Success"


def _google(query: str, start: int) -> Call:
    return Call(params={"q": query, "num": str(PAGE_SIZE), "start": str(1 + start)})


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name="serper",
            url="https://google.serper.dev/search",
            key_headers={"X-API-KEY": "SERPER_API_KEY"},
            make_call=_serper,
            results_key="organic",
            is_answer=lambda body: "searchParameters" in body,
        ),
        Engine(
            name="serpapi",
            url="https://serpapi.com/search.json",
            key_params={"api_key": "SERPAPI_API_KEY"},
            make_call=_serpapi,
            results_key="organic_results",
            is_answer=_serpapi_succeeded,
        ),
        Engine(
            name="google",
            url="https://customsearch.googleapis.com/customsearch/v1",
            key_params={"key": "GOOGLE_API_KEY", "cx": "GOOGLE_CSE_ID"},
            make_call=_google,
            results_key="items",
            is_answer=lambda body: body.get("kind") == "customsearch#search",
        ),
    )
}


def read_answer(engine: Engine, body: Body) -> list[Document]:
    """Return the results, best first; empty when the engine found nothing. Raises EngineError otherwise."""
    key, results = engine.results_key, body.get(engine.results_key)
    if results is None and engine.is_answer(body):
        return []
    if results is None:
        content = quote(str(dict(body)))
        raise EngineError(FailureKind.MALFORMED, f"the answer neither has {key!r} nor says 'none': {content}")
    if not isinstance(results, list):
        raise EngineError(FailureKind.MALFORMED, f"{key} is a {type(results).__name__}, not a list")
    return [_read_result(result, where=f"{key}[{i}]") for i, result in enumerate(results)]


def _read_result(result: object, *, where: str) -> Document:
    if not isinstance(result, dict):
        raise EngineError(FailureKind.MALFORMED, f"{where} is a {type(result).__name__}, not an object")
    values = {name: result.get(name, "") for name in ("title", "link", "snippet")}
    for name, value in values.items():
        if not isinstance(value, str):
            raise EngineError(FailureKind.MALFORMED, f"{where}.{name} is {quote(str(value))}, not a string")
    title, url, snippet = (_one_line(value) for value in values.values())
    if not url:
        raise EngineError(FailureKind.MALFORMED, f"{where} has no link")
    return make_document(url=url, title=title or url, snippet=snippet)


def make_document(*, url: str, title: str, snippet: str) -> Document:
    """Return a result in the format of the corpora: the quoted title on the first line, then the text."""
    return Document(id=url, contents=f'"{title}"\n{snippet}')


_RATE_LIMIT = re.compile(r"per.?(second|minute)|per 100 seconds|rateLimitExceeded", re.IGNORECASE)
_USED_UP = re.compile(r"quota|credit|run out of|daily.?limit|per.?(day|month)|billing", re.IGNORECASE)
_LASTING = re.compile(r"credit|run out of|daily.?limit|per.?(day|month)", re.IGNORECASE)


def is_retryable(status: int, content: str) -> bool:
    """Return whether a refusal is worth another attempt: a broken engine, or a limit that soon ends."""
    if status == 403:
        return bool(_RATE_LIMIT.search(content))
    if status == 429:
        return not _LASTING.search(content)
    return status == 408 or status >= 500


def explain_refusal(engine: Engine, status: int, content: str) -> EngineError:
    """Return the error of a failed request, from the content of the answer."""
    quoted = f"status {status}: {quote(content)}"
    if status in (403, 429) and is_retryable(status, content):
        reason = f"too many requests at a time ({quoted}); lower --online_parallel"
        return EngineError(FailureKind.UNAVAILABLE, reason)
    if status in (402, 429) or (status in (400, 403) and _USED_UP.search(content)):
        return EngineError(FailureKind.QUOTA, f"the quota is used up ({quoted}); wait or buy more")
    if status in (401, 403) or (status == 400 and re.search(r"api.?key", content, re.IGNORECASE)):
        keys = " and ".join(engine.key_variables)
        return EngineError(FailureKind.REFUSED, f"the key is not accepted ({quoted}); check {keys}")
    if status in (400, 413, 414, 422, 431):
        return EngineError(FailureKind.REFUSED, f"the query is not accepted ({quoted})")
    if status < 500 and status != 408:
        return EngineError(FailureKind.UNAVAILABLE, f"no search at this URL ({quoted}); check --online_url")
    return EngineError(FailureKind.UNAVAILABLE, f"does not work ({quoted})")


def _one_line(text: str) -> str:
    """Return the text without line breaks, runs of spaces and lone surrogates."""
    return " ".join(replace_surrogates(text).split())


def quote(text: str) -> str:
    """Return the beginning of an engine's text, for messages."""
    line = _one_line(text)
    return repr(line if len(line) <= _MAX_QUOTED_CHARS else line[:_MAX_QUOTED_CHARS] + "…")

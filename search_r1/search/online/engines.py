"""The wire formats of the search engines: what to send, how to read the answer, what a refusal means.

Documented by the engines themselves: serper.dev, serpapi.com/search-api, Google's Custom Search JSON API
(Programmable Search) and Bing Web Search v7, whose public service Microsoft retired in August 2025: it needs
the URL of a compatible service. Pages of ten everywhere, so that one request is one billed query.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from search_r1.search.retriever import FailureKind
from search_r1.search.schema import Document

PAGE_SIZE = 10
MAX_RESULTS = 100
"""Google gives no more for any query; nor do we ask the others."""
MAX_QUERY_CHARS = 2048
"""Longer ones are refused by every engine, and some would bill the refusal."""
MAX_QUOTED_CHARS = 300

Body = Mapping[str, object]


class EngineError(Exception):
    """The engine gave no answer to this query."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request without its keys, which are added where nothing is logged."""

    params: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, str | int] | None = None
    """Sent by POST as JSON; None is a GET."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One search engine."""

    name: str
    url: str
    key_params: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the URL that carry a key, each with the environment variable it is read from."""
    key_headers: Mapping[str, str] = field(default_factory=dict)
    """The same for headers."""
    list_price_usd: float | None
    """Of 1,000 queries; see `LIST_PRICES_OF`. None: there is no public price."""
    make_call: Callable[[str, int], Call]
    """From a query and the position of the first result, a multiple of PAGE_SIZE."""
    results_at: tuple[str, ...]
    """Where the list of results is in an answer that has one."""
    is_answer: Callable[[Body], bool]
    """Whether an answer without results says that there are none."""
    title_field: str = "title"
    url_field: str = "link"
    is_retired: bool = False
    """Nobody answers at `url` any more; others offer the same format elsewhere."""

    @property
    def key_variables(self) -> tuple[str, ...]:
        return (*self.key_params.values(), *self.key_headers.values())


LIST_PRICES_OF = "2025-06"
"""Month of the published list prices below: the smallest paid plan, which is the dearest."""


def _serper(query: str, start: int) -> Call:
    return Call(body={"q": query, "num": PAGE_SIZE, "page": 1 + start // PAGE_SIZE})


def _serpapi(query: str, start: int) -> Call:
    return Call(params={"engine": "google", "q": query, "num": str(PAGE_SIZE), "start": str(start)})


def _google(query: str, start: int) -> Call:
    return Call(params={"q": query, "num": str(PAGE_SIZE), "start": str(1 + start)})


def _bing(query: str, start: int) -> Call:
    params = {"q": query, "count": str(PAGE_SIZE), "offset": str(start), "responseFilter": "Webpages"}
    return Call(params=params | {"mkt": "en-US"})


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        engine.name: engine
        for engine in (
            Engine(
                name="serper",
                url="https://google.serper.dev/search",
                key_headers={"X-API-KEY": "SERPER_API_KEY"},
                list_price_usd=1.0,
                make_call=_serper,
                results_at=("organic",),
                is_answer=lambda body: "searchParameters" in body,
            ),
            Engine(
                name="serpapi",
                url="https://serpapi.com/search.json",
                key_params={"api_key": "SERPAPI_API_KEY"},
                list_price_usd=15.0,
                make_call=_serpapi,
                results_at=("organic_results",),
                is_answer=lambda body: _look_up(body, ("search_metadata", "status")) == "Success",
            ),
            Engine(
                name="google",
                url="https://customsearch.googleapis.com/customsearch/v1",
                key_params={"key": "GOOGLE_API_KEY", "cx": "GOOGLE_CSE_ID"},
                list_price_usd=5.0,
                make_call=_google,
                results_at=("items",),
                is_answer=lambda body: body.get("kind") == "customsearch#search",
            ),
            Engine(
                name="bing",
                url="https://api.bing.microsoft.com/v7.0/search",
                key_headers={"Ocp-Apim-Subscription-Key": "BING_API_KEY"},
                list_price_usd=None,
                make_call=_bing,
                results_at=("webPages", "value"),
                is_answer=lambda body: body.get("_type") == "SearchResponse",
                title_field="name",
                url_field="url",
                is_retired=True,
            ),
        )
    }
)


def read_answer(engine: Engine, body: Body) -> list[Document]:
    """Best first; empty when the engine says that it found nothing. Raises EngineError for anything else."""
    results = _look_up(body, engine.results_at)
    where = ".".join(engine.results_at)
    if results is None and engine.is_answer(body):
        return []
    if results is None:
        said = quote(str(dict(body)))
        raise EngineError(FailureKind.MALFORMED, f"the answer has neither {where} nor says 'none': {said}")
    if not isinstance(results, list):
        raise EngineError(FailureKind.MALFORMED, f"{where} is a {type(results).__name__}, not a list")
    return [_read_result(engine, result, where=f"{where}[{i}]") for i, result in enumerate(results)]


def _read_result(engine: Engine, result: object, *, where: str) -> Document:
    if not isinstance(result, dict):
        raise EngineError(FailureKind.MALFORMED, f"{where} is a {type(result).__name__}, not an object")
    values = {name: result.get(name, "") for name in (engine.title_field, engine.url_field, "snippet")}
    for name, value in values.items():
        if not isinstance(value, str):
            raise EngineError(FailureKind.MALFORMED, f"{where}.{name} is {quote(str(value))}, not a string")
    title, url, snippet = (one_line(value) for value in values.values())
    if not url:
        raise EngineError(FailureKind.MALFORMED, f"{where} has no {engine.url_field}")
    return make_document(url=url, title=title or url, snippet=snippet)


def make_document(*, url: str, title: str, snippet: str) -> Document:
    """A result in the format of the corpora: the quoted title on the first line, the text on the rest."""
    return Document(id=url, contents=f'"{title}"\n{snippet}')


_RATE_LIMIT = re.compile(r"per.?(second|minute)|per 100 seconds|rateLimitExceeded", re.IGNORECASE)
_USED_UP = re.compile(r"quota|credit|run out of|daily.?limit|per.?(day|month)|billing", re.IGNORECASE)
_LASTING = re.compile(r"credit|run out of|daily.?limit|per.?(day|month)", re.IGNORECASE)


def may_pass(status: int, said: str) -> bool:
    """Whether a refusal is worth another attempt: an engine out of order, or a limit that soon ends."""
    if status == 403:
        return bool(_RATE_LIMIT.search(said))
    if status == 429:
        return not _LASTING.search(said)
    return status == 408 or status >= 500


def explain_refusal(engine: Engine, status: int, said: str) -> EngineError:
    """A status that is no success, in our words. `said`: the body of the answer."""
    quoted = f"status {status}: {quote(said)}"
    if status in (403, 429) and may_pass(status, said):
        reason = f"too many requests at a time ({quoted}); lower --online_parallel"
        return EngineError(FailureKind.UNAVAILABLE, reason)
    if status in (402, 429) or (status in (400, 403) and _USED_UP.search(said)):
        return EngineError(FailureKind.QUOTA, f"the quota is used up ({quoted}); wait or buy more")
    if status in (401, 403) or (status == 400 and re.search(r"api.?key", said, re.IGNORECASE)):
        keys = " and ".join(engine.key_variables)
        return EngineError(FailureKind.REFUSED, f"the key is not accepted ({quoted}); check {keys}")
    if status in (400, 413, 414, 422, 431):
        return EngineError(FailureKind.REFUSED, f"the query is not accepted ({quoted})")
    if status < 500 and status != 408:
        return EngineError(FailureKind.UNAVAILABLE, f"no search at this URL ({quoted}); check --online_url")
    return EngineError(FailureKind.UNAVAILABLE, f"out of order ({quoted})")


def one_line(text: str) -> str:
    """Without line breaks, runs of spaces, and the half characters that JSON can spell but no text holds."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def quote(text: str) -> str:
    """The beginning of an engine's words, for messages."""
    line = one_line(text)
    return repr(line if len(line) <= MAX_QUOTED_CHARS else line[:MAX_QUOTED_CHARS] + "…")


def _look_up(body: Body, path: tuple[str, ...]) -> object:
    """None when a part of the path is missing."""
    found: object = body
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found

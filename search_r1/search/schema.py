"""The wire formats of `POST /retrieve` and `POST /page`, shared by server and client.

    {"queries": ["birthplace of Alice Marsh"], "topk": 3, "return_scores": true}
    {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\ntext"}, "score": 0.83}]]}

Without `return_scores` the inner lists hold the bare documents; `query` is accepted for a single query.

A query that could not be answered fails the whole request, unless `allow_failures` asks for the rest: then
its list is null and `errors` gives the reason. Null is not an empty list, which means that nothing was found.

    {"id": "7", "part": 2, "part_chars": 2000}
    {"page": {"title": "\\"Title\\"", "part": 2, "num_parts": 3, "passages": [{"id": "9", "text": "text"}]}}

The page is null for an unknown id, and has no passages where it has no such part.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_TOPK = 1000
MAX_QUERY_CHARS = 20_000
MAX_TIMEOUT_S = 86_400.0
MAX_ID_CHARS = 1000
MIN_PART_CHARS, MAX_PART_CHARS = 100, 100_000

Score = Annotated[float, Field(allow_inf_nan=False)]


def _check_unicode(text: str) -> str:
    """Raise ValueError for a lone surrogate, which no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at character {error.start}") from error
    return text


def _read_query(text: str) -> str:
    """Cut a long query. Raises ValueError for a lone surrogate."""
    return _check_unicode(text)[:MAX_QUERY_CHARS]


QueryText = Annotated[str, AfterValidator(_read_query)]


class RetrieveRequest(BaseModel):
    """A request, with exactly one of `query` and `queries`.

    Values are read as the published server reads them: "3" and 3.0 are 3, "true" and 1 are true, and unknown
    fields are ignored.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"queries": ["Where was Alice Marsh born?"], "topk": 3, "return_scores": True},
                {"query": "Where was Alice Marsh born?", "timeout_s": 5, "allow_failures": True},
            ],
            "oneOf": [
                {"required": ["query"], "properties": {"query": {"type": "string"}}},
                {"required": ["queries"], "properties": {"queries": {"type": "array"}}},
            ],
        },
    )

    query: QueryText | None = Field(
        default=None, description=f"A single query; its first {MAX_QUERY_CHARS} characters are read."
    )
    # A list stops at its first bad entry: a hostile body must not be answered with a million problems.
    queries: Annotated[list[QueryText], Field(fail_fast=True)] | None = Field(
        default=None, description="Any number up to --max_queries; a blank one finds nothing."
    )
    topk: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOPK,
        description="Passages per query at most. Null or 0: the server's default.",
    )
    return_scores: bool = Field(default=False, description="Give every document with its score.")
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="Seconds that the caller waits. A query that is not answered by then has failed. Null: "
        "the server's default.",
    )
    allow_failures: bool = Field(
        default=False,
        description="Answer the other queries where one fails, and name it in `errors`.",
    )

    @model_validator(mode="after")
    def _check_one_form(self) -> RetrieveRequest:
        if (self.query is None) == (self.queries is None):
            raise ValueError("expected exactly one of 'query' (a string) and 'queries' (a list of strings)")
        return self

    @property
    def texts(self) -> list[str]:
        """Return the queries, in whichever form they came."""
        return [self.query] if self.query is not None else self.queries or []


class Document(BaseModel):
    """One passage of the corpus."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str = Field(default="", examples=["7"])
    """Empty when the server sends none, as Search-R1's lexical retriever."""
    contents: str = Field(
        description="The first line is the title, the rest the text; a single line is text without a title.",
        examples=['"Alice Marsh"\nAlice Marsh was born in Bolton.'],
    )

    @property
    def title(self) -> str:
        """Return the first line of `contents`; empty where that is a single line."""
        title, newline, _ = self.contents.partition("\n")
        return title if newline else ""

    @property
    def text(self) -> str:
        """Return what follows the title."""
        _, newline, text = self.contents.partition("\n")
        return text if newline else self.contents


class ScoredDocument(BaseModel):
    """A passage and its score: higher is better, on a scale that depends on the retriever."""

    document: Document
    score: Score = Field(examples=[0.83])


class FailedQuery(BaseModel):
    """Why a query has no answer."""

    kind: str = Field(examples=["deadline"])
    reason: str = Field(
        description="For logs and messages: it is no search result and must not reach a prompt.",
        examples=["not answered within 5 s"],
    )


class ScoredAnswer(BaseModel):
    """The answer to `return_scores: true`: one list per query, best first; null for a query that failed."""

    result: list[list[ScoredDocument] | None]
    errors: list[FailedQuery | None] | None = Field(
        default=None, description="One entry per query where failures were allowed; null where there is none."
    )


class BareAnswer(BaseModel):
    """The answer to `return_scores: false`."""

    result: list[list[Document] | None]
    errors: list[FailedQuery | None] | None = None


class PageRequest(BaseModel):
    """A request for a part of the page that a passage is on."""

    model_config = ConfigDict(
        coerce_numbers_to_str=True,
        json_schema_extra={"examples": [{"id": "7"}, {"id": "7", "part": 2, "part_chars": 2000}]},
    )

    id: Annotated[str, AfterValidator(_check_unicode)] = Field(
        max_length=MAX_ID_CHARS, description="Of any passage of the page."
    )
    part: int = Field(default=1, ge=1, description="Which part, from 1.")
    part_chars: int = Field(
        default=2000, ge=MIN_PART_CHARS, le=MAX_PART_CHARS, description="Characters of a part at most."
    )


class PagePassage(BaseModel):
    """The text of one passage, as far as it is in the part."""

    id: str
    text: str


class Page(BaseModel):
    """A part of a page: consecutive passages with the same title."""

    title: str = Field(examples=['"Alice Marsh"'])
    part: int
    num_parts: int = Field(description="Of the page, with parts of the length that was asked for.")
    passages: list[PagePassage] = Field(
        description="In order; joined by spaces they are the text. Empty where there is no such part."
    )


class PageAnswer(BaseModel):
    """The answer to a request for a page."""

    page: Page | None = Field(description="Null for an unknown id.")

"""The wire format of `POST /retrieve`, shared by server and client.

    {"queries": ["birthplace of Alice Marsh"], "topk": 3, "return_scores": true}
    {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\ntext"}, "score": 0.83}]]}

Without `return_scores` the inner lists hold the bare documents; `query` is accepted for a single query.

A query that could not be answered fails the whole request, unless `allow_failures` asks for the rest: then
its list is null and `errors` gives the reason. Null is not an empty list, which means that nothing was found.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_TOPK = 1000
MAX_QUERY_CHARS = 20_000
MAX_TIMEOUT_S = 86_400.0

Score = Annotated[float, Field(allow_inf_nan=False)]


def _read_query(text: str) -> str:
    """Cut a long query. Raises ValueError for a lone surrogate, which no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at character {error.start}") from error
    return text[:MAX_QUERY_CHARS]


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
        """The queries, in whichever form they came."""
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

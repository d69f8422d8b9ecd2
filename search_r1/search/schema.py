"""The wire format of `POST /retrieve`, shared by server and client.

    {"queries": ["birthplace of Alice Marsh"], "topk": 3, "return_scores": true}
    {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\ntext"}, "score": 0.83}]]}

Without `return_scores` the inner lists hold the bare documents; `query` is accepted for a single query.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_TOPK = 1000

Score = Annotated[float, Field(allow_inf_nan=False)]


def _check_encodable(text: str) -> str:
    """JSON can spell lone surrogates, which are no text: tokenizers choke on them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at character {error.start}") from error
    return text


QueryText = Annotated[str, AfterValidator(_check_encodable)]


class RetrieveRequest(BaseModel):
    """What a client asks. Exactly one of `query` and `queries`."""

    model_config = ConfigDict(extra="forbid")

    query: QueryText | None = None
    queries: list[QueryText] | None = None
    topk: Annotated[int, Field(ge=1, le=MAX_TOPK)] | None = None
    """None: the server's default."""
    return_scores: bool = False

    @model_validator(mode="after")
    def _check_one_form(self) -> RetrieveRequest:
        if (self.query is None) == (self.queries is None):
            raise ValueError("expected exactly one of 'query' (a string) and 'queries' (a list of strings)")
        return self

    @property
    def texts(self) -> list[str]:
        """The queries, whichever form they came in."""
        return [self.query] if self.query is not None else self.queries or []


class Document(BaseModel):
    """One passage of the corpus."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str = ""
    """Empty when the server sends none, as Search-R1's lexical retriever."""
    contents: str
    """Title on the first line, text on the rest."""


class ScoredDocument(BaseModel):
    document: Document
    score: Score


class ScoredAnswer(BaseModel):
    """The answer to `return_scores: true`: one list per query, best first."""

    result: list[list[ScoredDocument]]

"""The wire format: what `POST /compute_info_gain` takes and gives. Field names are the published ones."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field


def _require_whole_characters(text: str) -> str:
    """JSON can spell half a character, a lone surrogate; no tokenizer can read it. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate, expected text") from None
    return text


Text = Annotated[str, AfterValidator(_require_whole_characters)]


class InfoGainItem(BaseModel):
    """One question with what was found for it."""

    question: Text = Field(description="The bare question.", examples=["Where was Alice Marsh born?"])
    context: Text = Field(
        description="The passages that were found, as one text; empty for none (the gain is then 0).",
        examples=["Alice Marsh was born in Bolton."],
    )
    answers: list[Text] = Field(description="Accepted answers.", examples=[["Bolton", "Bolton, England"]])


class InfoGainRequest(BaseModel):
    """A batch of items."""

    items: list[InfoGainItem]
    include_details: bool = Field(
        default=True, description="Return the evidence of every score too; leaving it out is faster."
    )


class ResponseDetail(BaseModel):
    """One sampled answer."""

    text: str
    mean_loglik: float = Field(description="Mean log-prob of the tokens that write the answer.")
    length: int = Field(description="Number of those tokens.")


class EntailmentDetail(BaseModel):
    """Entailment probabilities between sampled answers and golds.

    Both lists are flat, row by row: responses x answers, so that number r * n_answers + a belongs to
    response r and answer a.
    """

    n_responses: int
    n_answers: int
    resp_entails_ans: list[float]
    ans_entails_resp: list[float]


class InfoGainDetail(BaseModel):
    """What one score was made from."""

    with_context: list[ResponseDetail]
    no_context: list[ResponseDetail]
    entailment_with_context: EntailmentDetail
    entailment_no_context: EntailmentDetail
    clusters_with_context: list[int] = Field(description="Semantic class of every sampled answer.")
    clusters_no_context: list[int]
    score_with_context: float | None = Field(
        description="Belief in the answers, 0 to 1; null without answers."
    )
    score_no_context: float | None
    semantic_entropy_with_context: float = Field(description="In nats, over the semantic classes.")
    semantic_entropy_no_context: float


class InfoGainResponse(BaseModel):
    """Everything in the order of the items; a failed item has a null score and its error."""

    scores: list[float | None]
    errors: list[str | None]
    details: list[InfoGainDetail | None] | None = Field(description="Null when they were not asked for.")


class HealthResponse(BaseModel):
    """State of the service; `healthy` or `unhealthy`."""

    status: str
    mode: str | None = None
    device: str | None = None
    message: str | None = None

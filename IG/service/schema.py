"""The wire format of the service: what its addresses take and return.

Field names are the published ones; new fields are optional in requests and added to responses. Values are
read as by the published service: "5" is 5, "true" and 1 are true, unknown fields are ignored. An item that is
too large fails alone, and only the first 1,000,000 characters of a context are read.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, FailFast, Field

from IG.config import IGServiceConfig
from IG.sharing import ModelIdentity, Source, Work
from IG.wire import MAX_TIMEOUT_S

MAX_CONTEXT_CHARS = 1_000_000


def _require_valid_text(text: str) -> str:
    """Refuse lone surrogates: JSON can spell them, and no tokenizer can read them. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate, expected text") from None
    return text


Text = Annotated[str, AfterValidator(_require_valid_text)]
Context = Annotated[Text, AfterValidator(lambda text: text[:MAX_CONTEXT_CHARS])]

# A list stops at its first bad entry: a hostile body must not be answered with a million problems.


class InfoGainItem(BaseModel):
    """One question with everything that was found for it."""

    question: Text = Field(description="The bare question.", examples=["Where was Alice Marsh born?"])
    context: Context = Field(
        description="The passages that were found, as one text; empty for none (the gain is then 0).",
        examples=["Alice Marsh was born in Bolton."],
    )
    answers: Annotated[list[Text], FailFast()] = Field(
        description="Accepted answers; at least one, except for `--gain entropy`.",
        examples=[["Bolton", "Bolton, England"]],
    )


class RequestOptions(BaseModel):
    """What every request for work may say."""

    timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="Seconds until the answer, waiting for a turn included. What is not done by then "
        "gets null and an error that begins with `deadline:`; what is done keeps its number. "
        "Null: --request-timeout-s.",
    )


class InfoGainRequest(RequestOptions):
    """A batch of items."""

    items: Annotated[list[InfoGainItem], FailFast()] = Field(
        description="Any number up to --max-items; none gives none."
    )
    compat: bool | None = Field(
        default=None,
        description="Give what fails the number 0.0 beside its error, as the published service does, "
        "instead of null. Null: the service's setting `--compat`.",
    )
    include_details: bool = Field(
        default=True, description="Return the evidence of every score too; without it is faster."
    )


class EntailmentPair(BaseModel):
    """Two texts."""

    premise: Text = Field(
        description="What is given. Only its end is read where it is long.",
        examples=["Alice Marsh was born in Bolton."],
    )
    hypothesis: Text = Field(
        description="What may follow from it.", examples=["Where was Alice Marsh born? Bolton"]
    )


class EntailmentRequest(RequestOptions):
    """A batch of pairs."""

    pairs: Annotated[list[EntailmentPair], FailFast()] = Field(
        description="Any number up to --max-items; none gives none."
    )


class EntailmentResponse(BaseModel):
    """Everything in the order of the pairs; a failed one has null and its error."""

    probabilities: list[float | None] = Field(
        description="P(premise entails hypothesis). Null is not 0.", examples=[[0.98]]
    )
    errors: list[str | None] = Field(description="Why there is no probability.", examples=[[None]])
    work: Work = Field(description="What the request asked for and how much of it had to be done.")


class ResponseDetail(BaseModel):
    """One sampled answer."""

    text: str = Field(description="Without the stop string; possibly empty.", examples=["Bolton"])
    mean_loglik: float = Field(description="Mean log-prob of the answer's tokens.", examples=[-0.21])
    length: int = Field(description="Number of those tokens.", examples=[2])


class EntailmentDetail(BaseModel):
    """Entailment probabilities between sampled and accepted answers.

    Both lists are flat, row by row: number r * n_answers + a belongs to response r and answer a.
    """

    n_responses: int = Field(examples=[2])
    n_answers: int = Field(examples=[1])
    resp_entails_ans: list[float] = Field(description="P(response entails answer).", examples=[[1.0, 0.02]])
    ans_entails_resp: list[float] = Field(
        description="P(answer entails response), in the same order.", examples=[[1.0, 0.01]]
    )


class InfoGainDetail(BaseModel):
    """The evidence of one score: each field for the condition with the context, and without it."""

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
    standard_error_with_context: float | None = Field(
        description="Jackknife standard error of that condition's statistic over the samples; null where "
        "there is none, as for one sample. 0 means that all samples agree, not that the score is exact."
    )
    standard_error_no_context: float | None
    gain_standard_error: float | None = Field(description="Of the gain, both conditions together.")
    empty_share_with_context: float = Field(description="Share of the answers that have no text.")
    empty_share_no_context: float
    source_with_context: Source = Field(
        description="`sampled` for this condition, `joined` to sampling under way for another condition or "
        "request, or `cached` from before."
    )
    source_no_context: Source


class InfoGainResponse(BaseModel):
    """Everything in the order of the items; a failed item has a null score (`compat`: 0.0) and its error."""

    scores: list[float | None] = Field(description="The gains. Null is not 0.", examples=[[0.5]])
    errors: list[str | None] = Field(description="Why there is no score.", examples=[[None]])
    details: list[InfoGainDetail | None] | None = Field(description="Null when they were not asked for.")
    standard_errors: list[float | None] = Field(
        description="Jackknife standard error of every gain; null where there is none.", examples=[[0.21]]
    )
    beliefs_with_context: list[float | None] = Field(
        description="Belief in the answers with the context, 0 to 1; null without answers and for a failed "
        "item.",
        examples=[[0.75]],
    )
    beliefs_no_context: list[float | None] = Field(examples=[[0.25]], description="And without it.")
    gain_limit: float = Field(
        description="Largest absolute value that a score can have here: 1 for `--gain difference`, 3 for "
        "`log_ratio`, log(--num-generations) for `entropy`.",
        examples=[1.0],
    )
    work: Work = Field(description="What the request asked for and how much of it had to be done.")


Mode = Literal["single-CPU", "single-GPU", "multi-CPU", "multi-GPU"]
Message = Literal["Models not loaded", "No workers available", "Some workers are unhealthy", "Shutting down"]


class HealthResponse(BaseModel):
    """State of the service; `healthy` or `unhealthy`."""

    status: Literal["healthy", "unhealthy"]
    mode: Mode | None = None
    device: str | None = Field(default=None, description="Of the one worker.", examples=["cuda:0"])
    num_workers: int | None = Field(default=None, description="When there are several.", examples=[2])
    devices: list[str] | None = Field(
        default=None, description="One per worker, when there are several.", examples=[["cuda:0", "cuda:1"]]
    )
    message: Message | None = Field(default=None, description="What is wrong.")
    reason: str | None = Field(default=None, description="Why, where that is known.")
    version: str = Field(examples=["0.1.0"])


class VersionResponse(BaseModel):
    """Everything that the numbers depend on: models with the SHA-256 of their files, and settings."""

    version: str = Field(description="Of this package; `unknown` where it is not installed.")
    generator: str
    generator_digest: str | None = Field(description="Null until the models are loaded.")
    entailment: str
    entailment_digest: str | None
    score: str = Field(examples=["hard"])
    gain: str = Field(examples=["difference"])
    threshold: float
    num_generations: int
    temperature: float
    max_new_tokens: int
    max_context_words: int
    prompt_type: str = Field(examples=["default"])
    prompt_style: str = Field(examples=["plain"])
    prompt_file: str = Field(description="The text of `--prompt-file`; empty without one.")
    seed: int

    @classmethod
    def of(cls, config: IGServiceConfig, *, version: str, identity: ModelIdentity | None) -> VersionResponse:
        """Return the version of a service; `identity` is None until its models are loaded."""
        models = {"generator": config.model_path, "entailment": config.entailment_model}
        digests = {
            "generator_digest": identity.generator_digest if identity else None,
            "entailment_digest": identity.entailment_digest if identity else None,
        }
        return cls.model_validate(asdict(config) | models | digests | {"version": version})

"""The wire format: what `POST /compute_info_gain` takes and gives, and what the other addresses say.

Field names are the published ones; what is new is optional in requests and added to responses. Values are
read as the published service reads them: "5" is 5, "true" and 1 are true, unknown fields are ignored. An item
that is too large fails alone, and only the first 1,000,000 characters of a context are read.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

MAX_TIMEOUT_S = 86400.0
MAX_CONTEXT_CHARS = 1_000_000


def _require_whole_characters(text: str) -> str:
    """JSON can spell half a character, a lone surrogate; no tokenizer can read it. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate, expected text") from None
    return text


Text = Annotated[str, AfterValidator(_require_whole_characters)]
Context = Annotated[Text, AfterValidator(lambda text: text[:MAX_CONTEXT_CHARS])]

# A list stops at its first bad entry: a hostile body must not be answered with a million problems.


class InfoGainItem(BaseModel):
    """One question with what was found for it."""

    question: Text = Field(description="The bare question.", examples=["Where was Alice Marsh born?"])
    context: Context = Field(
        description="The passages that were found, as one text; empty for none (the gain is then 0).",
        examples=["Alice Marsh was born in Bolton."],
    )
    answers: Annotated[list[Text], FailFast()] = Field(
        description="Accepted answers; at least one, except for `--gain entropy`.",
        examples=[["Bolton", "Bolton, England"]],
    )


class InfoGainRequest(BaseModel):
    """A batch of items."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {
                            "question": "Where was Alice Marsh born?",
                            "context": "Alice Marsh was born in Bolton.",
                            "answers": ["Bolton", "Bolton, England"],
                        }
                    ],
                    "include_details": False,
                    "timeout_s": 60,
                }
            ]
        }
    )

    items: Annotated[list[InfoGainItem], FailFast()] = Field(
        description="Any number up to --max-items; none gives none."
    )
    include_details: bool = Field(
        default=True,
        description="Return the evidence of every score too; leaving it out is faster.",
    )
    compat: bool | None = Field(
        default=None,
        description="Give items that fail the score 0.0 beside their error, as the published service does, "
        "instead of null. Null: what the service was started with, `--compat`.",
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="Seconds that the caller waits, waiting for a turn included. Items that are not done by "
        "then get a null score and an error that begins with `deadline:`; finished ones keep their scores. "
        "Null: --request-timeout-s.",
    )


class ResponseDetail(BaseModel):
    """One sampled answer."""

    text: str = Field(description="Without the stop string; possibly empty.", examples=["Bolton"])
    mean_loglik: float = Field(
        description="Mean log-prob of the tokens that write the answer.", examples=[-0.21]
    )
    length: int = Field(description="Number of those tokens.", examples=[2])


class EntailmentDetail(BaseModel):
    """Entailment probabilities between sampled answers and golds.

    Both lists are flat, row by row: responses x answers, so that number r * n_answers + a belongs to
    response r and answer a.
    """

    n_responses: int = Field(examples=[2])
    n_answers: int = Field(examples=[1])
    resp_entails_ans: list[float] = Field(description="P(response entails answer).", examples=[[1.0, 0.02]])
    ans_entails_resp: list[float] = Field(
        description="P(answer entails response), in the same order.", examples=[[1.0, 0.01]]
    )


SampleSource = Literal["sampled", "joined", "cached"]


class InfoGainDetail(BaseModel):
    """What one score was made from."""

    with_context: list[ResponseDetail]
    no_context: list[ResponseDetail]
    entailment_with_context: EntailmentDetail
    entailment_no_context: EntailmentDetail
    clusters_with_context: list[int] = Field(
        description="Semantic class of every sampled answer.", examples=[[0, 1]]
    )
    clusters_no_context: list[int] = Field(examples=[[0, 1]])
    score_with_context: float | None = Field(
        description="Belief in the answers, 0 to 1; null without answers.", examples=[0.75]
    )
    score_no_context: float | None = Field(examples=[0.25])
    semantic_entropy_with_context: float = Field(
        description="In nats, over the semantic classes.", examples=[0.56]
    )
    semantic_entropy_no_context: float = Field(examples=[0.56])
    standard_error_with_context: float | None = Field(
        description="Jackknife standard error of that condition's statistic over the samples; null where "
        "there is none, as for one sample. 0 says that all samples agree, not that the score is exact.",
        examples=[0.15],
    )
    standard_error_no_context: float | None = Field(examples=[0.15])
    gain_standard_error: float | None = Field(
        description="Of the gain, both conditions together.", examples=[0.21]
    )
    empty_share_with_context: float = Field(
        description="Share of the answers that have no text.", examples=[0.0]
    )
    empty_share_no_context: float = Field(examples=[0.5])
    source_with_context: SampleSource = Field(
        description="`sampled` for this condition, `joined` to sampling under way for another condition or "
        "request, or `cached` from before."
    )
    source_no_context: SampleSource


class WorkDetail(BaseModel):
    """What the request asked for and how much of it really had to be done."""

    items: int = Field(examples=[4])
    conditions: int = Field(
        description="With and without context, of every item that could be read.", examples=[8]
    )
    distinct_prompts: int = Field(examples=[5])
    prompts_sampled: int = Field(description="Prompts whose sampling this request started.", examples=[5])
    prompts_joined: int = Field(
        description="Conditions whose prompt was being sampled already.", examples=[3]
    )
    prompts_cached: int = Field(description="Conditions whose samples were remembered.", examples=[0])
    baselines: int = Field(description="Conditions without context.", examples=[4])
    baselines_sampled: int = Field(description="Of those, really sampled by this request.", examples=[1])
    answers_sampled: int = Field(examples=[50])
    answers_empty: int = Field(description="Of those, without any text.", examples=[0])
    pairs_naive: int = Field(
        description="Directed pairs that a reading without any sharing judges.", examples=[760]
    )
    pairs_judged: int = Field(description="Pairs that this request sent to the model.", examples=[38])
    pairs_shared: int = Field(description="Pairs known or under way already.", examples=[120])
    pairs_equal: int = Field(description="Pairs settled by equal text.", examples=[94])


class InfoGainResponse(BaseModel):
    """Everything in the order of the items; a failed item has a null score (`compat`: 0.0) and its error."""

    scores: list[float | None] = Field(description="The gains. Null is not 0.", examples=[[0.5]])
    errors: list[str | None] = Field(description="Why there is no score.", examples=[[None]])
    details: list[InfoGainDetail | None] | None = Field(description="Null when they were not asked for.")
    standard_errors: list[float | None] = Field(
        description="Jackknife standard error of every gain; null where there is none.", examples=[[0.21]]
    )
    gain_limit: float = Field(
        description="Largest absolute value that a score can have here: 1 for `--gain difference`, 3 for "
        "`log_ratio`, log(--num-generations) for `entropy`.",
        examples=[1.0],
    )
    work: WorkDetail


class HealthResponse(BaseModel):
    """State of the service; `healthy` or `unhealthy`."""

    status: Literal["healthy", "unhealthy"]
    mode: Literal["single-CPU", "single-GPU", "multi-CPU", "multi-GPU"] | None = None
    device: str | None = Field(default=None, description="Of the one worker.", examples=["cuda:0"])
    num_workers: int | None = Field(default=None, description="When there are several.", examples=[2])
    devices: list[str] | None = Field(
        default=None, description="One per worker, when there are several.", examples=[["cuda:0", "cuda:1"]]
    )
    message: (
        Literal["Models not loaded", "No workers available", "Some workers are unhealthy", "Shutting down"]
        | None
    ) = Field(default=None, description="What is wrong.")
    reason: str | None = Field(default=None, description="Why, where that is known.")
    version: str = Field(examples=["0.1.0"])


class VersionResponse(BaseModel):
    """Everything that the numbers depend on."""

    version: str = Field(description="Of this package; `unknown` where it is not installed.")
    generator: str
    generator_digest: str | None = Field(
        description="SHA-256 of the model's files; null until the models are loaded."
    )
    entailment: str
    entailment_digest: str | None
    score: str = Field(examples=["hard"])
    gain: str = Field(examples=["difference"])
    threshold: float = Field(examples=[0.5])
    num_generations: int = Field(examples=[10])
    temperature: float = Field(examples=[1.0])
    max_new_tokens: int = Field(examples=[128])
    max_context_words: int = Field(examples=[4096])
    prompt_type: str = Field(examples=["default"])
    prompt_style: str = Field(examples=["plain"])
    seed: int = Field(examples=[0])

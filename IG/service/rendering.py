"""Write the outcomes of a request in the wire format."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from IG.belief import Belief
from IG.estimator import Estimates, GainEstimate, GainFailure
from IG.judging import Judgements
from IG.service.schema import (
    EntailmentDetail,
    EntailmentResponse,
    InfoGainDetail,
    InfoGainResponse,
    ResponseDetail,
)
from serving.encoding import replace_surrogates


async def render(
    estimates: Estimates, *, include_details: bool, gain_limit: float, failed_score: float | None
) -> bytes:
    """Return the response as JSON; details are written in a thread, off the event loop.

    `failed_score` is the score of items that failed.
    """
    measured = [outcome if isinstance(outcome, GainEstimate) else None for outcome in estimates.outcomes]
    response = InfoGainResponse(
        scores=[estimate.gain if estimate else failed_score for estimate in measured],
        errors=_errors(estimates.outcomes),
        details=None,
        standard_errors=[estimate.standard_error if estimate else None for estimate in measured],
        beliefs_with_context=[estimate.with_context.score if estimate else None for estimate in measured],
        beliefs_no_context=[estimate.no_context.score if estimate else None for estimate in measured],
        gain_limit=gain_limit,
        work=estimates.work,
    )

    def render_details() -> bytes:
        details = [_detail(estimate) if estimate else None for estimate in measured]
        return response.model_copy(update={"details": details}).model_dump_json().encode()

    if include_details and measured:
        return await asyncio.to_thread(render_details)
    return response.model_dump_json().encode()


def render_judgements(judgements: Judgements) -> bytes:
    """Return the response as JSON."""
    return (
        EntailmentResponse(
            probabilities=[
                None if isinstance(outcome, GainFailure) else outcome for outcome in judgements.outcomes
            ],
            errors=_errors(judgements.outcomes),
            work=judgements.work,
        )
        .model_dump_json()
        .encode()
    )


def _errors(outcomes: Sequence[object]) -> list[str | None]:
    return [replace_surrogates(one.reason) if isinstance(one, GainFailure) else None for one in outcomes]


def _detail(estimate: GainEstimate) -> InfoGainDetail:
    before, after = estimate.no_context, estimate.with_context
    assert before.full is not None
    assert after.full is not None
    return InfoGainDetail(
        with_context=_responses(after),
        no_context=_responses(before),
        entailment_with_context=_entailment(after),
        entailment_no_context=_entailment(before),
        clusters_with_context=after.full.clusters.tolist(),
        clusters_no_context=before.full.clusters.tolist(),
        score_with_context=after.score,
        score_no_context=before.score,
        semantic_entropy_with_context=after.full.semantic_entropy,
        semantic_entropy_no_context=before.full.semantic_entropy,
        standard_error_with_context=estimate.standard_error_with_context,
        standard_error_no_context=estimate.standard_error_no_context,
        gain_standard_error=estimate.standard_error,
        empty_share_with_context=_empty_share(after),
        empty_share_no_context=_empty_share(before),
        source_with_context=after.source,
        source_no_context=before.source,
    )


def _responses(belief: Belief) -> list[ResponseDetail]:
    return [
        ResponseDetail(
            text=replace_surrogates(answer.text), mean_loglik=answer.mean_log_prob, length=answer.num_tokens
        )
        for answer in belief.answers
    ]


def _empty_share(belief: Belief) -> float:
    return sum(not answer.text for answer in belief.answers) / len(belief.answers)


def _entailment(belief: Belief) -> EntailmentDetail:
    assert belief.full is not None
    forward, backward = belief.full.response_entails_gold, belief.full.gold_entails_response.T
    return EntailmentDetail(
        n_responses=forward.shape[0],
        n_answers=forward.shape[1],
        resp_entails_ans=forward.ravel().tolist(),
        ans_entails_resp=backward.ravel().tolist(),
    )

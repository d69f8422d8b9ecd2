from __future__ import annotations

import threading
from dataclasses import replace

from IG.estimator import GainEstimate, GainQuery
from IG.service.rendering import render
from tests.IG.service.backends import FakeBackend


class WatchedText(str):
    """A text that knows which threads encoded it."""

    threads: list[int]

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        self.threads.append(threading.get_ident())
        return super().encode(encoding, errors)


async def test_details_are_rendered_off_the_event_loop() -> None:
    query = GainQuery(question="Where?", context="a good passage", golds=("Bolton",))
    estimates = await FakeBackend().estimate([query], details=True, timeout_s=5)
    (estimate,) = estimates.outcomes
    assert isinstance(estimate, GainEstimate)
    text = WatchedText("Bolton")
    text.threads = []
    belief = estimate.with_context
    watched = replace(belief, answers=tuple(replace(answer, text=text) for answer in belief.answers))
    estimates = replace(estimates, outcomes=[replace(estimate, with_context=watched)])
    await render(estimates, include_details=True, gain_limit=1.0, failed_score=None)
    assert len(text.threads) == len(belief.answers)
    assert threading.get_ident() not in text.threads

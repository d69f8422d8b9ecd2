"""Texts of the OpenAPI document: the description of the service and of its refusals."""

from __future__ import annotations

from serving.web.openapi import COMMON, Explained

DESCRIPTION = """
The service samples short answers to a question with a context and without it, groups them by meaning, and
returns how much the belief in the accepted answers grew.

* `null` is not 0: an item that failed has a `null` score and its error; leave it out.
* The same item gets the same score alone and among others; what items have in common is done once.
* A caller that disconnects cancels work that no other caller waits for.
* 429 and 503 carry `Retry-After`, in seconds.
"""

REFUSALS: Explained = COMMON | {
    413: (
        "Too many items, or too long a body: send less at once.",
        "the request has 5000 items, expected at most 4096; split it or raise --max-items",
    ),
    429: (
        "So many items wait that these must come back later.",
        "the queue is full: 16384 of 16384 items wait or are worked on, no place for 4 more; try again "
        "in 3 s",
    ),
    503: ("Not ready: loading, out of workers, or shutting down.", "Models not loaded"),
}

"""The one error of this package that is meant for its user."""

from __future__ import annotations


class RetrieverError(ValueError):
    """Corpus, encoder or index is missing, malformed or does not fit: names what, where and the fix."""

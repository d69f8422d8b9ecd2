"""The errors of this package that are meant for its user."""

from __future__ import annotations


class RetrieverError(ValueError):
    """Corpus, encoder or index is missing, malformed or does not fit; the message names the fix."""


class ChangedFileError(RetrieverError):
    """A file in use was truncated or written: nothing that is read from it can be trusted until a restart."""

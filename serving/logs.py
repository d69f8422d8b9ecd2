"""Log without secrets or control characters, in records of bounded length."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from serving.redaction import redact_text

MAX_RECORD_CHARS = 8000
"""Long enough for a traceback."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe_text(text: str) -> str:
    """Hide secrets, cut out the middle of a long text, escape control characters, indent all but one line.

    Only the first line starts at column 0, so that no text can pass for another record.
    """
    # A secret that the first cut splits lies where the second one cuts.
    text = _cut_middle(redact_text(_cut_middle(text, max_chars=4 * MAX_RECORD_CHARS)))
    text = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return text.rstrip("\n").replace("\n", "\n  ")


def _cut_middle(text: str, *, max_chars: int = MAX_RECORD_CHARS) -> str:
    half = max_chars // 2
    return text if len(text) <= max_chars else f"{text[:half]} [...] {text[-half:]}"


class SafeFormatter(logging.Formatter):
    """Makes the formatted record safe, with its arguments and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return safe_text(super().format(record))


def configure_logging(form: str, *, quiet: Iterable[str], quiet_level: int = logging.WARNING) -> None:
    """Log to stderr in `form`, from level INFO on; the loggers `quiet` from `quiet_level` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in quiet:
        logging.getLogger(name).setLevel(quiet_level)

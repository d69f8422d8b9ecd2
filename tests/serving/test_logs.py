from __future__ import annotations

import logging

import pytest

from serving.logs import MAX_RECORD_CHARS, SafeFormatter, safe_text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("query \x1b[2J\x07\r\x9b31m", r"query \x1b[2J\x07\r\x9b31m"),
        ("a\u2028b\u202ec\udc80", r"a\u2028b\u202ec\udc80"),
        ("made up\n2026-01-01 ERROR forged\n", "made up\n  2026-01-01 ERROR forged"),
        ("naïve 東京\tok", "naïve 東京\tok"),
        ("asking http://me:planted@host/", "asking http://***@host/"),
    ],
)
def test_a_record_keeps_no_control_characters_no_secrets_and_only_its_own_first_line(
    text: str, written: str
) -> None:
    record = logging.LogRecord("service", logging.INFO, __file__, 1, "got %s", (text,), None)
    assert SafeFormatter("%(message)s").format(record) == f"got {written}"


def test_a_long_record_loses_its_middle() -> None:
    written = safe_text("begin " + "x" * 10_000_000 + " end")
    half = MAX_RECORD_CHARS // 2
    assert written == f"begin {'x' * (half - 6)} [...] {'x' * (half - 4)} end"

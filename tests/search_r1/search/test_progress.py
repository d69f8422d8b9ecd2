from __future__ import annotations

import pytest

from search_r1.search.progress import PhaseProgress, format_seconds


def test_without_a_terminal_it_logs_how_far_it_is_and_how_long_it_takes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with PhaseProgress(log_every_s=0.0) as progress:
        progress("encode passages", 5_000_000, 21_015_324)
        progress("encode passages", 6_000_000, 21_015_324)
    first, last = (record.message for record in caplog.records)
    assert first == "encode passages: 5,000,000 of 21,015,324"
    assert last.startswith("encode passages: 6,000,000 of 21,015,324, about ")
    assert last.endswith(" left")


def test_it_does_not_log_too_often(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with PhaseProgress() as progress:
        for done in range(100):
            progress("write", done, 100)
    assert not caplog.records


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (89, "89 s"), (120, "2 min"), (5399, "90 min"), (12600, "3.5 h")]
)
def test_times_are_shown_as_people_say_them(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown

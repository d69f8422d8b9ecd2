from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl.utils.logs import ProgressLog, configure_logging


@pytest.fixture
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in root.handlers[:]:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


@pytest.mark.usefixtures("_root_logger")
def test_lines_reach_screen_and_file_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file = tmp_path / "run" / "train.log"
    configure_logging(log_file=log_file)
    logging.getLogger("verl.test").info("asking %s", "http://me:planted@host/retrieve")
    logging.getLogger("verl.test").debug("too quiet")
    screen = capsys.readouterr().err
    written = log_file.read_text()
    assert "asking http://***@host/retrieve" in screen
    assert "INFO    verl.test: asking http://***@host/retrieve" in written
    assert "planted" not in screen + written
    assert "too quiet" not in written


def test_progress_has_the_rate_of_this_start_and_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log = ProgressLog(logging.getLogger("verl.test"), "answers", done=90, interval_s=0.0)
    log(90, 100)
    log(91, 100)
    none_yet, one = caplog.messages
    assert none_yet == "answers: 90 of 100, 0.00 per second"
    assert re.fullmatch(r"answers: 91 of 100, \d+\.\d\d per second, \d:\d\d:\d\d left", one)

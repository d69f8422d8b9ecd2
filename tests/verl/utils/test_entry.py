from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from verl.errors import ConfigError, ServiceError
from verl.utils.actors import ActorError
from verl.utils.entry import error_line
from verl.utils.logs import configure_logging


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """The log of an entry point; the root logger is put back."""
    root = logging.getLogger()
    before = list(root.handlers)
    configure_logging(log_file=tmp_path / "train.log")
    yield tmp_path / "train.log"
    for handler in set(root.handlers) - set(before):
        with suppress(OSError):
            handler.close()
    root.handlers[:] = before


def end_with(error: BaseException) -> str:
    """What the interpreter would print last; a text as exit code is printed and means 1."""
    with pytest.raises(SystemExit) as end, error_line():
        raise error
    return str(end.value.code)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("trainer.seed must not be -1"), "error: trainer.seed must not be -1"),
        (ActorError("actor 'engine-0' died"), "error: actor 'engine-0' died"),
        (ServiceError("retriever", "http://me:planted@host: no"), "error: retriever: http://***@host: no"),
        (OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"),
         "error: run/metrics.jsonl: No space left on device; free some space there and repeat the command"),
        (PermissionError(errno.EACCES, "Permission denied", "run"),
         "error: run: Permission denied; change its permissions or name another folder"),
        (FileExistsError(errno.EEXIST, "File exists", "run"),
         "error: run: File exists; it is not a folder: move it away or name another folder"),
        (OSError("no address"), "error: no address"),
    ],
)  # fmt: skip
def test_what_a_user_can_cause_is_one_line(
    error: Exception, line: str, log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_with(error) == line
    assert capsys.readouterr().err == ""
    assert "Traceback" in log_file.read_text()


def test_a_defect_keeps_its_traceback(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_with(KeyError("step")).startswith("error: unexpected KeyError: 'step'; please report")
    for text in (capsys.readouterr().err, log_file.read_text()):
        assert "Traceback" in text
        assert "test_entry.py" in text


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, error_line():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_log_that_cannot_be_written_is_reported_once(
    tmp_path: Path, log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full.log"
    full.symlink_to("/dev/full")
    configure_logging(log_file=full)
    for number in range(3):
        logging.getLogger("verl.test").info("line %d", number)
    screen = capsys.readouterr().err
    assert [f"line {number}" in screen for number in range(3)] == [True] * 3
    assert screen.count("cannot be written") == 1
    assert "Traceback" not in screen

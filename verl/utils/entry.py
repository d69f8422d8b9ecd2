"""End a program that fails with exit code 1 and one `error:` line that says why."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from serving.logs import safe_text
from verl.errors import UserError
from verl.utils.logs import ONLY_IN_FILE

logger = logging.getLogger(__name__)

_FIXES = {
    errno.ENOSPC: "free some space there and repeat the command",
    errno.EDQUOT: "raise the quota or free some space there, and repeat the command",
    errno.EFBIG: "raise the limit (ulimit -f) and repeat the command",
    errno.EROFS: "make it writable or name another folder",
    errno.EACCES: "change its permissions or name another folder",
    errno.EPERM: "change its permissions or name another folder",
    errno.EEXIST: "it is not a folder: move it away or name another folder",
    errno.ENOTDIR: "a part of it is not a folder: name another folder",
    errno.EMFILE: "raise the limit (ulimit -n) and repeat the command",
}


@contextmanager
def error_line(*, ends_interrupts: bool = True) -> Iterator[None]:
    """Exit with code 1 and one line for an error of the block, with code 130 after Ctrl-C.

    Without `ends_interrupts` KeyboardInterrupt passes, for a caller that says more.

    The traceback goes to the log file, that of a defect also to the screen.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not ends_interrupts:
            raise
        _flush()
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except (UserError, OSError) as error:
        logger.info("ended by this error", exc_info=True, extra=ONLY_IN_FILE)
        _exit(describe_error(error))
    except Exception as error:
        logger.exception("a defect of this program")
        _exit(f"unexpected {type(error).__name__}: {error}; please report the traceback above")


def _exit(text: str) -> NoReturn:
    _flush()
    sys.exit(f"error: {safe_text(text)}")


def _flush() -> None:
    with suppress(OSError):  # stdout is closed
        sys.stdout.flush()  # otherwise output of Ray would follow the last line


def describe_error(error: BaseException) -> str:
    """Return the message with its notes; for an OSError the file, the reason and the fix, if known."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else text
        fix = _FIXES.get(error.errno or 0)
        text = f"{text}; {fix}" if fix else text
    return "".join([text, *getattr(error, "__notes__", [])])

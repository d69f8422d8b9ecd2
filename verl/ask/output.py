"""Keep the lines of libraries out of what the user reads: vLLM logs to stdout, its processes to both."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from serving.logs import SafeFormatter

_SHOWN_LINES = 15
_OURS = ("verl", "search_r1", "serving")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The streams that the user reads."""

    stdout: TextIO
    stderr: TextIO
    log: Path | None = None
    """Where everything else is printed."""

    def explain(self, error: Exception) -> None:
        """Add the end of the log to an error: why an engine cannot start is often only there."""
        if self.log is not None:
            lines = self.log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            error.add_note("\n".join(["\nThe log ends:", *lines]))


@contextmanager
def apart_from_libraries(log: Path) -> Iterator[Output]:
    """Send what this process and its children print to `log`; give streams for what the user reads.

    Warnings of this project go to the user, too.
    """
    streams = (sys.stdout, sys.stderr)
    out, err = (os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding) for stream in streams)
    handler = logging.StreamHandler(err)
    handler.setFormatter(SafeFormatter("%(levelname)s %(message)s"))
    with log.open("w") as sink, out, err:
        for stream in streams:
            stream.flush()
            os.dup2(sink.fileno(), stream.fileno())
        for name in _OURS:
            logging.getLogger(name).addHandler(handler)
        try:
            yield Output(stdout=out, stderr=err, log=log)
        finally:
            for name in _OURS:
                logging.getLogger(name).removeHandler(handler)
            for stream, original in zip(streams, (out, err), strict=True):
                stream.flush()
                original.flush()
                os.dup2(original.fileno(), stream.fileno())

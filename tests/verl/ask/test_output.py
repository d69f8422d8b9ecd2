"""What libraries print is kept apart from what the user reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, subprocess, sys
from pathlib import Path
from verl.ask.output import apart_from_libraries

print("before")
with apart_from_libraries(Path(sys.argv[1])) as output:
    print("of a library")
    subprocess.run(["sh", "-c", "echo of a child; echo of a child >&2"])
    print("for the user", file=output.stdout)
    logging.getLogger("verl.ask").warning("for the user, too")
    logging.getLogger("vllm").warning("of a library")
    error = RuntimeError("no engine")
    output.explain(error)
    print(error.__notes__[0], file=output.stderr)
print("after")
"""


def test_the_user_reads_only_what_is_for_the_user(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", PROGRAM, log], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["before", "for the user", "after", ""]
    first, *notes = done.stderr.strip().split("\n")
    assert first == "WARNING for the user, too"
    assert notes == ["The log ends:", *log.read_text().strip().split("\n")] or notes[0] == ""
    assert log.read_text().count("of a child") == 2
    assert log.read_text().count("of a library") == 2

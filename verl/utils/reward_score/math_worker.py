"""Grade answers to mathematical problems: what `math_grader.py` runs, with one line of JSON per answer.

    python math_worker.py CPU_SECONDS
    <- {"ready": true}
    -> {"answer": "1/2", "golds": ["0.5"]}
    <- {"score": 1.0}

Requests and replies go over stdin, which is a socket, so that a library can print to stdout. It is a process
of its own, because comparing expressions can take any time and memory. The system ends it when one answer
takes more CPU time than allowed.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys
from collections.abc import Sequence
from typing import TextIO

from math_verify import parse, verify

_MAX_MEMORY_BYTES = 4 << 30
_MAX_ANSWER_CHARS = 500
"""Longer ones are no answers to a problem, and take long to read."""
_MATH_MARK = re.compile(r"\\boxed|\\\(|\\\[|(?<!\\)\$")
_PERCENT = re.compile(r"(?<!\\)%")
_WORD = re.compile(r"(?<![\\\w{])[A-Za-z]{2,}(?![\w}])")
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"}
    | {"log", "ln", "exp", "sqrt", "min", "max", "gcd", "lcm", "pi", "or", "and"}
)
_MAX_WORDS = 2


def grade(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if the answer equals a gold answer as a mathematical expression.

    An answer that raises an error, such as one of memory, is wrong; an error in a gold answer is raised.
    """
    if len(answer) > _MAX_ANSWER_CHARS:
        return 0.0
    wanted = [read_expressions(gold) for gold in golds]
    try:
        given = read_expressions(answer)
        return float(any(verify(gold, given, timeout_seconds=None) for gold in wanted))
    except Exception:  # any error of a library that reads what a policy wrote
        return 0.0


def read_expressions(text: str) -> list[object]:
    r"""Return the expressions of an answer: what is in `\boxed{}` or `$..$`, else all of it.

    Of a sentence only its last number is read: letter by letter, it would be a product of symbols.
    """
    text = _PERCENT.sub(r"\\%", text.strip().removesuffix("."))
    num_words = sum(word.lower() not in _FUNCTIONS for word in _WORD.findall(text))
    if not _MATH_MARK.search(text) and num_words <= _MAX_WORDS:
        text = f"${text}$"
    return list(parse(text, parsing_timeout=None))


def main() -> None:
    """Answer requests until stdin ends."""
    channel = open(0, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    logging.disable()  # of limits that are switched off, and of texts that are no expressions
    cpu_time_s = float(sys.argv[1])
    highest = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = _MAX_MEMORY_BYTES if highest == resource.RLIM_INFINITY else min(_MAX_MEMORY_BYTES, highest)
    resource.setrlimit(resource.RLIMIT_AS, (limit, highest))
    grade("1/2", ["0.5"])  # the library imports much at the first use, which no answer has to pay for
    _reply(channel, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        # Ends the process, also inside of code that does not return to the interpreter.
        signal.setitimer(signal.ITIMER_PROF, cpu_time_s)
        try:
            reply: dict[str, object] = {"score": grade(request["answer"], request["golds"])}
        except Exception as error:  # any error of a library that reads a gold answer
            reply = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(channel, reply)


def _reply(channel: TextIO, reply: dict[str, object]) -> None:
    channel.write(f"{json.dumps(reply)}\n")
    channel.flush()


if __name__ == "__main__":
    main()

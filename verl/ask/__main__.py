"""Ask a checkpoint: it searches, reads and answers, and each turn is shown as it happens.

    python -m verl.ask "Where was Gilbert Nash born?"
    python -m verl.ask                                   # a conversation: one question a line, Ctrl-D ends it
    python -m verl.ask --model runs/NAME "..."           # a run, a checkpoint, a model folder or a hub id

Without --model the newest quickstart's last checkpoint answers. The settings of an episode (format, tools,
prompt file, limits, passages per query) are those of the run that the checkpoint belongs to, so that a greedy
answer is that of the run's evaluation. Every question is asked on its own.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.text import Text

from serving.web.settings import add_settings, expand_home
from verl.ask.output import Output, apart_from_libraries
from verl.ask.settings import SERVER_SETTINGS
from verl.utils.entry import error_line
from verl.utils.logs import configure_logging

USAGE = """\
--gains measures, after the answer, how much each turn raised the log-prob of that answer: it says which
search led to the answer, not that the answer is right. With --gold it is the gain of the right answer, as in
training; with --ig-service the information gain of the passages, from a running IG service.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments. Exit with one line for those that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.ask",
        description=__doc__,
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", nargs="*", help="asked at once; without one they are read line by line")
    parser.add_argument("--model", metavar="PATH|ID", help="run, checkpoint, model folder or hub id")
    parser.add_argument(
        "--retriever",
        metavar="URL",
        help="of a running one (default: starts that of the embedded world)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--max-turns", type=int, help="turns that may call tools (default: as in the run)")
    parser.add_argument("--gains", action="store_true", help="measure the gain of each turn, see below")
    parser.add_argument(
        "--gold", action="append", default=[], metavar="TEXT", help="a right answer, for gains"
    )
    parser.add_argument("--ig-service", metavar="URL", help="measure gains by this IG service")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="another setting, such as agent.format=tool_calls (verl/trainer/config/ppo_trainer.yaml)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per question on stdout")
    parser.add_argument("--verbose", action="store_true", help="show the log of engine and tools, too")
    parser.add_argument(
        "--serve", action="store_true", help="serve a page and an OpenAI-compatible endpoint instead"
    )
    serving = parser.add_argument_group("with --serve")
    add_settings(serving, SERVER_SETTINGS)
    options = parser.parse_args(expand_home(argv))
    if options.serve and (options.question or options.json or options.gold):
        parser.error("--serve takes its questions over HTTP: leave out the question, --json and --gold")
    if not 0 <= options.temperature < math.inf:
        parser.error(f"--temperature must be a finite number of at least 0, got {options.temperature}")
    if options.max_turns is not None and options.max_turns < 1:
        parser.error(f"--max-turns must be at least 1, got {options.max_turns}")
    # Bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer reads.
    if any(not is_unicode(text) for text in (*options.question, *options.gold)):
        parser.error("the question and --gold must be UTF-8")
    return options


def is_unicode(text: str) -> bool:
    """Return whether the text has no lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_questions(options: argparse.Namespace, console: Console) -> Iterator[str]:
    """Yield the question of the command line, else the lines of stdin that are not blank.

    Bytes of stdin that are not UTF-8 become U+FFFD, which the terminal shows with the question.
    """
    if options.question:
        yield " ".join(options.question)
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            if sys.stdin.isatty():
                console.print(Text("question> ", style="bold"), end="")
            line = input()
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the questions; return the exit code: 0, 1 if the last episode failed, 130 after Ctrl-C."""
    options = parse(argv)
    # Explicitly: a shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(options)
    except KeyboardInterrupt:  # out here the streams are the terminal's again
        sys.stderr.write("interrupted\n")
        return 130


def run(options: argparse.Namespace) -> int:
    """Open the agent and answer; return the exit code."""
    with ExitStack() as stack:
        if options.verbose:
            configure_logging()
            output = Output(stdout=sys.stdout, stderr=sys.stderr)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ask-"))
            output = stack.enter_context(apart_from_libraries(Path(folder) / "ask.log"))
        with error_line(ends_interrupts=False):
            # Takes seconds, so only after the arguments are checked.
            from verl.ask.serve import serve
            from verl.ask.session import run_session

            if options.serve:
                return serve(options, output)
            console = Console(file=output.stderr if options.json else output.stdout)
            runner = stack.enter_context(asyncio.Runner())
            questions = read_questions(options, console)
            return run_session(runner, options, questions=questions, console=console, output=output)


if __name__ == "__main__":
    sys.exit(main())

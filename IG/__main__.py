"""`python -m IG`: serve information gains, or measure them before training.

python -m IG serve --port 8310
python -m IG doctor --num-questions 50
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {
    "serve": "serve the information gain of contexts over HTTP",
    "doctor": "measure gains on a sample of questions before training: noise, judge, advice",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command with the arguments that follow its name; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m IG",
        description="Information gain of contexts, measured with a frozen language model.",
        epilog="`python -m IG serve --help` and `python -m IG doctor --help` list their flags.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve | doctor")
    for name, meaning in COMMANDS.items():
        commands.add_parser(name, help=meaning, description=meaning, add_help=False)
    given = sys.argv[1:] if arguments is None else list(arguments)
    chosen = parser.parse_args(given[:1])
    if chosen.command == "serve":
        from IG.service.IG_server import main as serve

        return serve(given[1:])
    from IG.doctor.command import main as examine

    return examine(given[1:])


if __name__ == "__main__":
    sys.exit(main())

"""The command `index`: plan, build, measure and verify indexes, and see what a retriever can give at best.

    index plan --n 21015324 --dim 768 --ram 16GB
    index build --corpus_path corpus.jsonl --model_path intfloat/e5-base-v2 --save_dir index

Each command is a module with `add_arguments` and `run`, imported only when it is asked for: planning must not
wait for torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from search_r1.search.errors import RetrieverError
from serving.logs import configure_logging
from serving.web.settings import expand_home

logger = logging.getLogger(__name__)

_INTERRUPTED = 130


class CommandModule(Protocol):
    """What the module of a command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags. Imports nothing heavy."""
        ...

    def run(self, settings: argparse.Namespace) -> int:
        """Do it. Exit status; raises RetrieverError for what the user can mend."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command by where it lives."""

    module: str
    meaning: str


COMMANDS: Mapping[str, Command] = {
    "plan": Command(
        module="search_r1.search.plan",
        meaning="size, memory, time and recall of every kind of index before any work, and which one to take",
    ),
    "build": Command(
        module="search_r1.search.index_builder",
        meaning="encode a corpus and write its index; goes on where an interrupted build stopped",
    ),
    "recall": Command(
        module="search_r1.search.recall",
        meaning="how much of what exact search finds an index finds",
    ),
    "verify": Command(
        module="search_r1.search.verify",
        meaning="read index and corpus whole and compare them with the manifest",
    ),
    "ceiling": Command(
        module="search_r1.search.ceiling",
        meaning="share of questions whose answer is in the passages that their text finds, at several depths",
    ),
}


class _HelpFormatter(argparse.HelpFormatter):
    """Shows defaults where there are some and the text does not tell them itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        says_so = "default" in text if text else True
        if says_so or default is None or default is False or default in ("", argparse.SUPPRESS):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default {shown.replace('%', '%%')})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: of the command; 1 what it could not do, 2 wrong arguments, 130 interrupted."""
    given = expand_home(arguments)
    name = _read_name(given[:1])
    configure_logging(
        "%(asctime)s %(levelname)s %(message)s",
        quiet=("faiss", "faiss.loader", "httpx", "matplotlib", "sentence_transformers"),
    )
    module = cast(CommandModule, importlib.import_module(COMMANDS[name].module))
    parser = argparse.ArgumentParser(
        prog=f"index {name}",
        description=f"{COMMANDS[name].meaning.capitalize()}.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    settings = parser.parse_args(given[1:])
    try:
        return module.run(settings)
    except RetrieverError as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _read_name(given: Sequence[str]) -> str:
    """The command asked for; ends as argparse does on --help and on an unknown name, with the nearest one."""
    parser = argparse.ArgumentParser(
        prog="index",
        description="Plan, build and examine the indexes of a retriever.",
        epilog="`index COMMAND --help` lists the flags of a command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.meaning, add_help=False)
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        guess = f": did you mean {near[0]}?" if near else ""
        parser.error(f"there is no command {given[0]!r}{guess} Expected one of {', '.join(COMMANDS)}")
    return str(parser.parse_args(given).command)


if __name__ == "__main__":
    sys.exit(main())

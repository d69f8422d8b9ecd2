"""The command `index`: plan, build and verify indexes, and measure what a retriever can give at best.

    index plan --n 21015324 --dim 768 --ram 16GB
    index build --corpus_path corpus.jsonl --model_path intfloat/e5-base-v2 --save_dir index

Each command is a module with `add_arguments` and `run`, imported only when it is asked for: planning need not
wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from search_r1.search.errors import RetrieverError
from serving.logs import configure_logging
from serving.web.settings import expand_home

logger = logging.getLogger(__name__)

_INTERRUPTED = 130


class CommandModule(Protocol):
    """The module of a command."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags. Imports nothing heavy."""
        ...

    def run(self, settings: argparse.Namespace) -> int:
        """Run the command and return its exit status. Raises RetrieverError for what the user can fix."""
        ...


COMMANDS: Mapping[str, tuple[str, str]] = {
    "plan": (
        "search_r1.search.plan",
        "disk and memory of every kind of index before any work, and which one to build",
    ),
    "build": (
        "search_r1.search.index_builder",
        "encode a corpus and write its index; continues where an interrupted build stopped",
    ),
    "verify": (
        "search_r1.search.verify",
        "read index and corpus whole and compare them with the manifest",
    ),
    "ceiling": (
        "search_r1.search.ceiling",
        "share of questions whose answer is in the passages that their text finds, at several depths",
    ),
    "audit": (
        "search_r1.search.audit",
        "whether the evidence for each answer is in the corpus and can be retrieved, per question",
    ),
}
"""Module and meaning by name."""


class _HelpFormatter(argparse.HelpFormatter):
    """Shows defaults where there are some and the text does not state them itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        is_stated = "default" in text if text else True
        if is_stated or default is None or default is False or default in ("", argparse.SUPPRESS):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default {shown.replace('%', '%%')})"


def main(
    arguments: Sequence[str] | None = None, *, commands: Mapping[str, tuple[str, str]] = COMMANDS
) -> int:
    """Return the exit status: of the command; 1 what it could not do, 2 wrong arguments, 130 interrupted."""
    given = expand_home(arguments)
    parser = argparse.ArgumentParser(
        prog="index",
        description="Plan, build and examine the indexes of a retriever.",
        epilog="`index COMMAND --help` lists the flags of a command.",
        allow_abbrev=False,
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (path, meaning) in commands.items():
        is_asked = given[:1] == [name]
        command = parsers.add_parser(
            name,
            help=meaning,
            description=f"{meaning.capitalize()}.",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        if is_asked:
            module = cast(CommandModule, importlib.import_module(path))
            module.add_arguments(command)
    settings = parser.parse_args(given)
    configure_logging(
        "%(asctime)s %(levelname)s %(message)s",
        quiet=("faiss", "faiss.loader", "httpx", "matplotlib", "sentence_transformers"),
    )
    try:
        return module.run(settings)
    except RetrieverError as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        logger.error("%s", f"{error.filename}: {error.strerror}" if error.filename else error)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

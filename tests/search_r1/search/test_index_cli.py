from __future__ import annotations

import argparse
import errno
import subprocess
import sys
import types
from pathlib import Path

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.index_cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[3]


def test_help_explains_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, (_, meaning) in COMMANDS.items():
        assert f"{name} {meaning}" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["paln"], "invalid choice: 'paln' (choose from"),
        (["plan", "--n", "3", "--nn", "3"], "--nn"),
    ],
)
def test_what_is_not_known_ends_with_2_and_says_what_is(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_lists_its_flags_without_loading_what_it_works_with(name: str) -> None:
    """In a process of its own: the libraries of other tests must not count."""
    code = (
        "import sys\n"
        "from search_r1.search.index_cli import main\n"
        "try:\n"
        f"    main(['{name}', '--help'])\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 0\n"
        "heavy = {'torch', 'transformers', 'faiss', 'sentence_transformers', 'matplotlib', 'vllm', 'ray'}\n"
        "sys.exit(f'loaded {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: index {name}" in done.stdout


def test_it_is_the_script_of_the_package() -> None:
    script = Path(sys.executable).parent / "index"
    done = subprocess.run([script, "plan", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--dim" in done.stdout


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (None, 7),
        (RetrieverError("corpus x is not a file"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "x.jsonl"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_how_a_command_ends_is_the_exit_status(
    ending: BaseException | None,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = types.ModuleType("made_up_command")

    def run(settings: argparse.Namespace) -> int:
        if ending is not None:
            raise ending
        return int(settings.number)

    module.run = run  # type: ignore[attr-defined]
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_command", module)
    commands = {"do": ("made_up_command", "do it")}
    assert main(["do", "--number", "7"], commands=commands) == status
    if isinstance(ending, RetrieverError):
        assert caplog.messages == ["corpus x is not a file"]
    if isinstance(ending, PermissionError):
        assert caplog.messages == ["x.jsonl: Permission denied"]

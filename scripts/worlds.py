"""The parts of a world that the quickstart trains on: which files a folder holds, and what it sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.files import sha256_of_file
from verl.errors import UserError
from verl.trainer.config.overrides import in_quotes

SETTINGS_FILE = "quickstart.json"
_NOT_USED = ("README.md", "doctor.jsonl", "manifest.json")
"""Files of a world that no run reads."""
WORLD = "{world}"
"""Stands for the folder of a world in the arguments that its file, or a plan, adds."""
_PROGRAMS = ("retriever", "ig_service", "trainer")


class WorldError(UserError):
    """A folder lacks a part of a world; the message names all of them and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The folders and files of a world, and the arguments that its `quickstart.json` adds."""

    folder: Path
    policy: Path
    generator: Path
    index: Path
    arguments: Mapping[str, tuple[str, ...]]

    @property
    def retriever_flags(self) -> tuple[str, ...]:
        """Return the flags that make the retriever serve this corpus."""
        return (
            "--corpus_path", str(self.folder / "corpus.jsonl"),
            "--index_path", str(self.index),
            "--retriever_model", str(self.folder / "models" / "encoder"),
            *self.arguments["retriever"],
        )  # fmt: skip

    @property
    def ig_service_flags(self) -> tuple[str, ...]:
        """Return the flags that make the IG service load these models."""
        return (
            "--model-path", str(self.generator),
            "--entailment-model", str(self.folder / "models" / "entailment"),
            *self.arguments["ig_service"],
        )  # fmt: skip

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the overrides that make the trainer ask these questions of this policy."""
        return (
            f"data.train_files={in_quotes(str(self.folder / 'train.parquet'))}",
            f"data.val_files={in_quotes(str(self.folder / 'test.parquet'))}",
            f"actor_rollout_ref.model.path={in_quotes(str(self.policy))}",
            *self.arguments["trainer"],
        )


def open_world(folder: Path, *, policy: Path | None, generator: Path | None) -> World:
    """Return the world in a folder; its own models unless others are named. Raises WorldError."""
    world = folder.resolve()
    models = {
        "--policy": (policy or world / "models" / "policy").resolve(),
        "--generator": (generator or world / "models" / "generator").resolve(),
    }
    files = [world / name for name in ("corpus.jsonl", "train.parquet", "test.parquet")]
    configs = [world / "models" / name / "config.json" for name in ("encoder", "entailment")]
    indexes = sorted((world / "index").glob("*.index"))
    lacking = [f"--world {folder}: {path} is missing" for path in (*files, *configs) if not path.is_file()]
    if len(indexes) != 1:
        lacking.append(f"--world {folder}: {world / 'index'} holds {len(indexes)} files *.index, expected 1")
    lacking += [
        f"{flag} {path} is no model folder: it has no config.json"
        for flag, path in models.items()
        if not (path / "config.json").is_file()
    ]
    if lacking:
        raise WorldError(
            "\n  ".join(
                ["the quickstart cannot train in this world:", *lacking,
                 "make it with scripts/make_world.py or make real, or name other folders"]
            )
        )  # fmt: skip
    return World(
        folder=world,
        policy=models["--policy"],
        generator=models["--generator"],
        index=indexes[0],
        arguments=_read_arguments(world),
    )


def _read_arguments(world: Path) -> dict[str, tuple[str, ...]]:
    """Return the arguments for each program from the optional file, with the folder in place of `{world}`."""
    path = world / SETTINGS_FILE
    expected = f"expected an object with lists of arguments for {', '.join(_PROGRAMS)}"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        given = {}
    except ValueError as error:
        raise WorldError(f"{path} is not JSON ({error}); {expected}") from None
    if not isinstance(given, dict) or not set(given) <= set(_PROGRAMS):
        raise WorldError(f"{path}: {expected}")
    for program, arguments in given.items():
        if not isinstance(arguments, list) or not all(isinstance(one, str) for one in arguments):
            raise WorldError(f"{path}: {program} is {arguments!r}; {expected}")
    return {
        program: tuple(place_in_world(one, folder=world) for one in given.get(program, []))
        for program in _PROGRAMS
    }


def place_in_world(argument: str, *, folder: Path) -> str:
    """Return an argument with the folder in place of `{world}`."""
    return argument.replace(WORLD, str(folder))


def describe_source(world: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that a damaged world is made from, by their place in the world."""
    return {str(path.relative_to(world)): sha256_of_file(path) for path in sorted(list_content(world))}


def list_content(world: Path) -> list[Path]:
    """Return the files that runs in a world read, but for the index, which is made of some of them."""
    files = [path for path in world.iterdir() if path.is_file() and path.name not in _NOT_USED]
    return [*files, *(path for path in (world / "models").rglob("*") if path.is_file())]

"""Tasks in processes: their order and cores, and what happens when one fails or is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from world import side_by_side
from world.side_by_side import Task

_FOREVER_S = 3600


def note(folder: Path, name: str) -> None:
    """Write what is there already."""
    (folder / name).write_text(" ".join(sorted(path.name for path in folder.iterdir())))


def meet(folder: Path, name: str, other: str) -> None:
    """Wait until the other task runs, too."""
    (folder / name).touch()
    while not (folder / other).exists():
        time.sleep(0.01)


def count_threads_beside(folder: Path, name: str, other: str) -> int:
    meet(folder, name, other)
    side_by_side.use_free_cores()
    threads = torch.get_num_threads()
    meet(folder, f"{name} has counted", f"{other} has counted")
    return threads


def fail_beside(folder: Path, other: str) -> None:
    meet(folder, "failing", other)
    raise ValueError("no such city")


def wait_beside(folder: Path, name: str, other: str) -> None:
    meet(folder, name, other)
    time.sleep(_FOREVER_S)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_begins_when_those_before_it_have_ended_and_the_first_named_first(tmp_path: Path) -> None:
    tasks = {
        "last": Task(partial(note, tmp_path, "last"), after=("first", "second", "long", "made before")),
        "long": Task(partial(note, tmp_path, "long"), after=("first",)),
        "first": Task(partial(note, tmp_path, "first")),
        "second": Task(partial(note, tmp_path, "second")),
    }
    assert list(side_by_side.run(tasks, processes=1)) == list(tasks)
    assert (tmp_path / "long").read_text() == "first"  # although `second` was ready before
    assert (tmp_path / "second").read_text() == "first long"
    assert (tmp_path / "last").read_text() == "first long second"


def test_tasks_that_do_not_need_each_other_run_together_and_one_alone_takes_all_cores(
    tmp_path: Path,
) -> None:
    tasks = {
        "one": Task(partial(count_threads_beside, tmp_path, "one", "two")),
        "two": Task(partial(count_threads_beside, tmp_path, "two", "one")),
        "alone": Task(torch.get_num_threads, after=("one", "two")),
    }
    assert side_by_side.run(tasks, processes=3) == {"one": 1, "two": 1, "alone": 3}


def test_a_failure_is_named_and_ends_the_others(tmp_path: Path) -> None:
    tasks = {
        "waiting": Task(partial(wait_beside, tmp_path, "waiting", "failing")),
        "failing": Task(partial(fail_beside, tmp_path, "waiting")),
        "never": Task(partial(note, tmp_path, "never"), after=("failing",)),
    }
    with pytest.raises(ValueError, match="no such city") as raised:
        side_by_side.run(tasks, processes=2)
    assert raised.value.__notes__ == [" (during failing)"]
    assert not multiprocessing.active_children()
    assert not (tmp_path / "never").exists()


def test_a_killed_process_is_named() -> None:
    with pytest.raises(ChildProcessError, match=r"killed \(out of memory\?\) during generator; one process"):
        side_by_side.run({"generator": Task(die), "never": Task(die, after=("generator",))}, processes=2)

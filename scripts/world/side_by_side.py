"""Run tasks in processes, several at once, each as soon as those before it have ended."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from serving.processes import end_with_parent

if TYPE_CHECKING:
    from ctypes import c_int

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Task(Generic[T]):
    """What to do, and the names of the tasks before it; names that are not among the tasks are ignored."""

    work: Callable[[], T]
    after: tuple[str, ...] = ()


def run(tasks: Mapping[str, Task[T]], *, processes: int) -> dict[str, T]:
    """Return the results of all tasks, in their order, with at most so many `processes` on as many cores.

    Of the tasks that can begin, the one that is named first begins first. The first exception of a task ends
    the others and is raised with a note that names the task. Raises ChildProcessError if a process was
    killed.
    """
    sorter = TopologicalSorter({name: set(task.after) & set(tasks) for name, task in tasks.items()})
    sorter.prepare()
    ready: set[str] = set()
    results: dict[str, T] = {}
    context = multiprocessing.get_context("spawn")
    num_running = context.Value("i", 0, lock=False)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(processes, num_running)
    ) as pool:
        running: dict[Future[T], str] = {}
        try:
            while sorter.is_active():
                ready |= set(sorter.get_ready())
                # The pool gets no more than it can begin: it takes tasks in the order of arrival.
                begun = [name for name in tasks if name in ready][: processes - len(running)]
                ready -= set(begun)
                num_running.value = len(running) + len(begun)
                running |= {pool.submit(_work, tasks[name].work): name for name in begun}
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running[future]] = _result_of(future, running[future])
                    sorter.done(running.pop(future))
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a process was killed (out of memory?) during {' or '.join(running.values())}; "
                "one process at a time needs less"
            ) from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
    return {name: results[name] for name in tasks}


def _result_of(future: Future[T], name: str) -> T:
    """Return the result of a task; an exception, which may not say where it is from, gets a note of it."""
    try:
        return future.result()
    except Exception as error:
        error.add_note(f" (during {name})")
        raise


@dataclass(frozen=True, slots=True)
class _Share:
    """What a process knows of the others."""

    processes: int
    num_running: c_int


_share: _Share | None = None


def _start_worker(processes: int, num_running: c_int) -> None:
    """Let this process end with its parent, which alone is interrupted by Ctrl-C."""
    global _share
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _share = _Share(processes, num_running)


def _work(work: Callable[[], T]) -> T:
    use_free_cores()
    return work()


def use_free_cores() -> None:
    """Compute on as many threads as there are cores for each task that runs now.

    Every task begins so; a long one calls this again on its way. Outside of tasks nothing changes.
    """
    if _share is not None:
        threads = max(1, _share.processes // max(1, _share.num_running.value))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

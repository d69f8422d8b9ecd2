"""Record what a rank computes in a step, as a Chrome trace that https://ui.perfetto.dev opens."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch.profiler import ProfilerActivity

from verl.utils.timing import Span

logger = logging.getLogger(__name__)

MAX_PASSES = 4
"""Forward passes that are recorded of each call, with the backward pass and optimizer step that follow."""
MAX_EVENTS = 1_000_000
"""Of one file: about 14 MB compressed, 200 MB of JSON."""
_DRIVER, _CALLS = 10_000_001, 10_000_002
"""Processes of the trace that are none of the machine: above the largest number that Linux gives."""

_Event = dict[str, Any]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Profile:
    """The calls of one rank in one step, and what their first passes computed."""

    def __init__(self) -> None:
        self._calls: list[Span] = []
        self._events: list[_Event] = []
        self._torch: torch.profiler.profile | None = None
        self._passes = 0

    @contextmanager
    def record(self, name: str) -> Iterator[None]:
        """Record the block as a call."""
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        recorder = torch.profiler.profile(activities=activities)
        recorder.start()
        self._torch, self._passes = recorder, 0
        start_ns = time.time_ns()
        try:
            yield
        finally:
            self._calls.append(Span(name, start_ns, time.time_ns()))
            self._stop()
        self._events += _read_events(recorder)

    def begin_pass(self) -> None:
        """Count a forward pass; beyond `MAX_PASSES` the rest of the call is not recorded."""
        self._passes += 1
        if self._passes > MAX_PASSES:
            self._stop()

    def _stop(self) -> None:
        if self._torch is not None:
            self._torch.stop()
            self._torch = None

    def write(self, path: Path, *, rank: int, spans: Sequence[Span]) -> None:
        """Write the trace, with the trainer's `spans` on the same clock."""
        pid = os.getpid()
        events = [
            *_name_process(_DRIVER, "trainer: phases", order=-2),
            *_name_process(_CALLS, f"rank {rank}: calls", order=-1),
            *_name_process(pid, f"rank {rank}", order=0),
            *(_to_event(span, process=_DRIVER) for span in spans),
            *(_to_event(span, process=_CALLS) for span in self._calls),
        ]
        room = MAX_EVENTS - len(events)
        if len(self._events) > room:
            logger.warning("%s: the first %d of %d events were kept", path, room, len(self._events))
        events += self._events[:room]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", encoding="utf-8") as file:
                json.dump({"displayTimeUnit": "ms", "traceEvents": events}, file)
        except OSError as error:  # a trace is no reason to end a run
            logger.error("%s is not complete: %s", path, error)


class Profiled(Protocol):
    """What has a profile while a step is recorded."""

    profile: Profile | None


_Worker = TypeVar("_Worker", bound=Profiled)


def profiled(
    method: Callable[Concatenate[_Worker, _Arguments], _Result],
) -> Callable[Concatenate[_Worker, _Arguments], _Result]:
    """Decorate a method: record its calls while the object has a profile."""

    @wraps(method)
    def call(self: _Worker, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if self.profile is None:
            return method(self, *args, **kwargs)
        with self.profile.record(method.__name__):
            return method(self, *args, **kwargs)

    return call


def _read_events(recorder: torch.profiler.profile) -> list[_Event]:
    """Return the events of a recording, their times in microseconds of Unix time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())
    offset = trace.get("baseTimeNanoseconds", 0) / 1000
    events: list[_Event] = trace["traceEvents"]
    for event in events:
        if "ts" in event:
            event["ts"] += offset
    return [event for event in events if _is_kept(event)]


def _is_kept(event: _Event) -> bool:
    """Leave out the recordings' own spans, and the name of this process, which `write` gives."""
    is_name = str(event["name"]).startswith("process_") and event["pid"] == os.getpid()
    return isinstance(event["pid"], int) and not is_name


def _name_process(process: int, name: str, *, order: int) -> list[_Event]:
    common = {"ph": "M", "pid": process, "tid": 0}
    return [
        {**common, "name": "process_name", "args": {"name": name}},
        {**common, "name": "process_sort_index", "args": {"sort_index": order}},
    ]


def _to_event(span: Span, *, process: int) -> _Event:
    return {
        "ph": "X",
        "cat": "phase",
        "name": span.name,
        "pid": process,
        "tid": 0,
        "ts": span.start_ns / 1000,
        "dur": (span.end_ns - span.start_ns) / 1000,
    }

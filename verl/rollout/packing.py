"""Trajectories as bytes, on their way from the process of their engine to that of the trainer.

Pickle's own way for frozen dataclasses with slots looks up the fields of every object again, which takes
the trainer several times as long as all the rest, and a trajectory has about ten objects per turn.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from verl.types import (
    Action,
    Message,
    Observation,
    Passage,
    Question,
    Span,
    ToolCall,
    Trajectory,
    Turn,
)

_FIELDS: Mapping[type, tuple[str, ...]] = {
    cls: tuple(field.name for field in fields(cls))
    for cls in (Action, Message, Observation, Passage, Question, Span, ToolCall, Trajectory, Turn)
}


def pack(trajectory: Trajectory) -> bytes:
    """Return the bytes from which `unpack` makes an equal trajectory."""
    packed = io.BytesIO()
    pickler = pickle.Pickler(packed, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(trajectory)
    return packed.getvalue()


def unpack(packed: bytes) -> Trajectory:
    """Return the trajectory of bytes that an engine's process has packed."""
    trajectory: Trajectory = pickle.loads(packed)
    return trajectory


def _reduce(value: object) -> tuple[Callable[..., object], tuple[object, ...]]:
    cls = type(value)
    return _restore, (cls, tuple([getattr(value, name) for name in _FIELDS[cls]]))


def _restore(cls: type, values: tuple[object, ...]) -> object:
    restored: object = object.__new__(cls)
    for name, value in zip(_FIELDS[cls], values, strict=True):
        object.__setattr__(restored, name, value)
    return restored


_REDUCERS: Mapping[type, Callable[[Any], Any]] = {
    **copyreg.dispatch_table,
    **dict.fromkeys(_FIELDS, _reduce),
}

"""Keep the garbage collector from visiting what lives as long as the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Leave all objects that exist now out of the collections inside the block.

    Modules and models are some hundred thousand objects, and a step makes enough garbage that all of them
    are visited several times. Afterwards they are collected as usual, which libraries check at exit.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

"""Derive the seed of every random draw of a run from its place: step, question, sample.

The same path gives the same seed in every process and on every machine, independent of what ran before.
"""

from __future__ import annotations

import hashlib


def derive_seed(*path: int | str) -> int:
    """Return a seed (63 bits, not negative) for a path such as `derive_seed(7, "rollout", step, uid)`."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

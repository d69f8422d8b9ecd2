"""The seed tree of a run: every random draw has a seed of its own, derived from where it belongs.

The same path gives the same seed in every process and on every machine, whatever else ran before it.
"""

from __future__ import annotations

import hashlib


def derive_seed(*path: int | str) -> int:
    """A seed (63 bits, not negative) for a place in the tree, as `derive_seed(7, "rollout", step, uid)`."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

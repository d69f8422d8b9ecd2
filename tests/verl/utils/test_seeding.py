"""The seed tree."""

from __future__ import annotations

import subprocess
import sys

from verl.utils.seeding import derive_seed


def test_seeds_are_the_same_in_every_process() -> None:
    code = "from verl.utils.seeding import derive_seed; print(derive_seed(0, 'rollout', 1, 'nq/train/0', 2))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) == derive_seed(0, "rollout", 1, "nq/train/0", 2)


def test_paths_do_not_collide() -> None:
    paths: list[tuple[int | str, ...]] = [
        (1, 23),
        (12, 3),
        ("1", 23),
        ("1,23",),
        (1, 2, 3),
        (),
        ("a", "b"),
        ("ab",),
    ]
    seeds = {derive_seed(*path) for path in paths}
    assert len(seeds) == len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)

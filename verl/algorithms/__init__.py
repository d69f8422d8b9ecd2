"""The methods by name: one file each, one line each here. docs/methods.md says how to add one."""

from __future__ import annotations

from verl.algorithms.base import Algorithm
from verl.algorithms.inforeasoner import InfoReasoner
from verl.algorithms.search_r1 import SearchR1

ALGORITHMS: dict[str, type[Algorithm]] = {
    "search_r1": SearchR1,
    "inforeasoner": InfoReasoner,
}

"""The methods by name: one file each, one line each here. docs/methods.md says how to add one."""

from __future__ import annotations

from verl.algorithms.base import Algorithm
from verl.algorithms.cw_grpo import CWGRPO
from verl.algorithms.gigpo import GiGPO
from verl.algorithms.ig_search import IGSearch
from verl.algorithms.igpo import IGPO
from verl.algorithms.inforeasoner import InfoReasoner
from verl.algorithms.search_r1 import SearchR1
from verl.algorithms.siop import SIOP
from verl.algorithms.stepsearch import StepSearch
from verl.algorithms.tips import TIPS

ALGORITHMS: dict[str, type[Algorithm]] = {
    "search_r1": SearchR1,
    "inforeasoner": InfoReasoner,
    "ig_search": IGSearch,
    "igpo": IGPO,
    "tips": TIPS,
    "siop": SIOP,
    "gigpo": GiGPO,
    "stepsearch": StepSearch,
    "cw_grpo": CWGRPO,
}

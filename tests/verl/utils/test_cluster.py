"""What is checked of a cluster; tests/e2e/test_nodes.py joins a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.processes import free_port
from verl.errors import ConfigError
from verl.utils.cluster import Share, find_shortage, join_cluster

SHARE = Share(address="10.0.0.1:6379", num_nodes=2, gpus=8, cpus=8)


def node(address: str, **resources: float) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "Resources": resources}


def test_a_shortage_is_named_with_what_the_nodes_have() -> None:
    full, small = node("10.0.0.1", CPU=64, GPU=8), node("10.0.0.2", CPU=64, GPU=4)
    assert find_shortage([full, full], share=SHARE) is None
    assert find_shortage([full, small, full], share=SHARE) is None
    found = find_shortage([full, small, node("10.0.0.3", CPU=8)], share=SHARE)
    assert found is not None
    assert found.startswith(
        "trainer.nnodes=2 needs 2 nodes with 8 GPUs and 8 CPUs each; the Ray cluster at 10.0.0.1:6379 has "
        "10.0.0.1 (8 GPUs, 64 CPUs), 10.0.0.2 (4 GPUs, 64 CPUs), 10.0.0.3 (0 GPUs, 8 CPUs). Add nodes"
    )
    assert "trainer.n_gpus_per_node" in found
    on_cpus = find_shortage([], share=Share(address="auto", num_nodes=1, cpus=2))
    assert on_cpus is not None
    assert "1 nodes with 2 CPUs each" in on_cpus
    assert "has no node" in on_cpus
    assert "trainer.num_cpu_workers" in on_cpus


async def test_where_no_cluster_answers_the_key_is_named(tmp_path: Path) -> None:
    share = Share(address=f"127.0.0.1:{free_port()}", num_nodes=2, cpus=1)
    with pytest.raises(ConfigError, match=r"trainer\.ray_address='127.*nothing answers.*ray start --head"):
        await join_cluster(share, paths=[], shared=tmp_path, timeout_s=0)

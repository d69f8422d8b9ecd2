"""Give up all rights, then run the Python program on stdin: `sandbox.py` starts this process for each.

It imports the standard library only, because it cannot read other files of the project. It gives up rights
in the order limits, capabilities, files (Landlock), system calls (seccomp), each as far as this machine has
it. Then it reports them as one line of JSON on stderr, closes stderr and runs the code, whose only output is
stdout.
"""

from __future__ import annotations

import ast
import ctypes
import io
import json
import os
import resource
import struct
import sys
import types
from collections.abc import Mapping, Sequence

_NAME = "<code>"
_LIBC = ctypes.CDLL(None, use_errno=True)
_MACHINE = os.uname().machine
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL = 9
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION = 0x20080522
# Linux numbers these calls alike on every architecture.
_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = (1 << bit for bit in (0, 1, 2, 3, 14))
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
# struct sock_filter: load a word of the call's description, mask it, jump if equal, return.
_LOAD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
# struct seccomp_data: the arguments have 8 bytes each, the lower half first.
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENT_OFFSETS = 0, 4, range(16, 64, 8)
_ALLOW, _FAIL_WITH_EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CALLS = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, ioctl 16 29, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -,
pipe 22 -, select 23 -, sched_yield 24 124, mremap 25 216, mincore 27 232, madvise 28 233, dup 32 23,
dup2 33 -, nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172, sendfile 40 71,
exit 60 93, uname 63 160, fcntl 72 25, fsync 74 82, fdatasync 75 83, ftruncate 77 46,
getdents 78 -, getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -,
unlink 87 -, readlink 89 -, umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165,
sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177,
getppid 110 173, getpgrp 111 -, getgroups 115 158, rt_sigpending 127 136, rt_sigtimedwait 128 137,
sigaltstack 131 132, statfs 137 43, fstatfs 138 44, gettid 186 178, time 201 -, futex 202 98,
sched_getaffinity 204 123, getdents64 217 61, restart_syscall 219 128, fadvise64 221 223,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_create 213 -,
epoll_wait 232 -, epoll_ctl 233 21, openat 257 56, mkdirat 258 34, newfstatat 262 79, unlinkat 263 35,
renameat 264 38, renameat2 316 276, readlinkat 267 78, faccessat 269 48, faccessat2 439 439, pselect6 270 72,
ppoll 271 73, set_robust_list 273 99, epoll_pwait 281 22, epoll_pwait2 441 441, fallocate 285 47,
eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70,
getcpu 309 168, getrandom 318 278, copy_file_range 326 285, statx 332 291, rseq 334 293, membarrier 324 283,
close_range 436 436, socketpair 53 199, sendto 44 206, recvfrom 45 207, shutdown 48 210,
timerfd_create 283 85, timerfd_settime 286 86
"""
"""What may be called, as `name number-on-x86_64 number-on-aarch64`: memory, files, clocks, own timers, pairs
of connected sockets. All else fails with EPERM: processes, threads, other sockets, programs, signals,
tracing, mounts, owners and modes of files, shared memory, other limits. Never add `sendmsg` or `sendmmsg`: a
filter cannot read the address in their argument."""

_REFUSED_COMMANDS = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902)}
"""Second arguments that set the process that gets a signal when a descriptor is ready, and the signal."""

_REQUIRED_WORDS = {
    # AF_UNIX and, without its flags, SOCK_STREAM: from other pairs a datagram could go to any address.
    "socketpair": ((_ARGUMENT_OFFSETS[0], 0xFFFFFFFF, 1), (_ARGUMENT_OFFSETS[1], 0xF, 1)),
    # No address, in both halves of the pointer.
    "sendto": ((_ARGUMENT_OFFSETS[4], 0xFFFFFFFF, 0), (_ARGUMENT_OFFSETS[4] + 4, 0xFFFFFFFF, 0)),
}
"""Words of the arguments that must have a value: offset, mask, value."""


def main() -> None:
    """Run the code on stdin as the JSON in the first argument says.

    It has limits, readable, writable, packages, and expected: what has to be reported before the code is run.
    """
    spec = json.loads(sys.argv.pop(1))
    code = sys.stdin.buffer.read().decode()
    null, report = os.open(os.devnull, os.O_RDWR), os.dup(2)
    os.dup2(null, 0)
    os.dup2(null, 2)
    os.closerange(3, report)
    os.closerange(report + 1, 1 << 16)
    sys.path += spec["packages"]
    output = sys.stdout
    assert isinstance(output, io.TextIOWrapper)
    output.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        layers = restrict(spec["limits"], readable=spec["readable"], writable=spec["writable"])
    except (OSError, ValueError) as error:
        os.write(report, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(report, json.dumps(layers).encode())
    os.close(report)
    if spec["expected"] in (None, layers):
        run(code, output)
    os._exit(0)


def restrict(
    limits: Mapping[str, tuple[int, int]], *, readable: Sequence[str], writable: Sequence[str]
) -> dict[str, object]:
    """Give up what this machine lets a process give up, and return what that was. Raises OSError."""
    for name, wanted in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        highest = resource.getrlimit(kind)[1]
        if highest == resource.RLIM_INFINITY:
            highest = max(wanted)
        resource.setrlimit(kind, (min(wanted[0], highest), min(wanted[1], highest)))
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if _MACHINE in _SYS_CAPSET:
        header = struct.pack("II", _CAPABILITY_VERSION, 0)
        _check(_LIBC.syscall(_SYS_CAPSET[_MACHINE], header, bytes(24)), "capset")
    # Last, because it forbids the other calls.
    return {"landlock": restrict_files(readable, writable), "seccomp": restrict_calls()}


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> int:
    """Deny to open other files and to signal other processes; return the version of Landlock, 0 if none."""
    version = _LIBC.syscall(_SYS_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return 0
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    every_right = (1 << num_rights) - 1
    # TCP ports from version 4 on; abstract sockets and signals of other processes from version 6 on.
    size = 8 if version < 4 else 16 if version < 6 else 24
    attributes = struct.pack("QQQ", every_right, 0b11, 0b11)[:size]
    rules = _check(
        _LIBC.syscall(_SYS_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset"
    )
    read = _EXECUTE | _READ_FILE | _READ_DIR
    for paths, rights in ((readable, read), (writable, every_right)):
        for path in paths:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            possible = every_right if os.path.isdir(path) else every_right & _FILE_RIGHTS
            rule = struct.pack("=Qi", rights & possible, beneath)
            _check(_LIBC.syscall(_SYS_ADD_RULE, rules, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(beneath)
    _check(_LIBC.syscall(_SYS_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    os.close(rules)
    return int(version)


def restrict_calls() -> bool:
    """Let every system call fail that is not in `_CALLS`; return whether this machine can do that."""
    if _MACHINE not in _ARCHITECTURES:
        return False
    column = 1 + [*_ARCHITECTURES].index(_MACHINE)
    calls = [call.split() for call in _CALLS.split(",")]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_JUMP_IF_EQUAL, 1, 0, _ARCHITECTURES[_MACHINE]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    for name, number in [(call[0], int(call[column])) for call in calls if call[column] != "-"]:
        rule = write_rule(name)
        program += [(_JUMP_IF_EQUAL, 0, len(rule), number), *rule]
    program.append((_RETURN, 0, 0, _FAIL_WITH_EPERM))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    return bool(_LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0)


def write_rule(name: str) -> list[tuple[int, int, int, int]]:
    """Return the instructions that allow a system call, except with arguments that it must not have."""
    refuse = (_RETURN, 0, 0, _FAIL_WITH_EPERM)
    rule = []
    for command in _REFUSED_COMMANDS.get(name, ()):
        rule += [(_LOAD, 0, 0, _ARGUMENT_OFFSETS[1]), (_JUMP_IF_EQUAL, 0, 1, command), refuse]
    for offset, mask, value in _REQUIRED_WORDS.get(name, ()):
        rule += [(_LOAD, 0, 0, offset), (_AND, 0, 0, mask), (_JUMP_IF_EQUAL, 1, 0, value), refuse]
    return [*rule, (_RETURN, 0, 0, _ALLOW)]


def run(code: str, output: io.TextIOWrapper) -> None:
    """Run the code as `__main__`, and print the value of its last expression or the error that ended it."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        tree = parse(code)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, _NAME, "exec"), module.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), _NAME, "eval"), module.__dict__)
            if value is not None:
                print(repr(value), file=output)
    except BaseException as error:
        # An exit without a message is not an error.
        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            print(describe(error), file=output)
    output.flush()


def parse(code: str) -> ast.Module:
    """Return the syntax tree of the code, also where the first line alone has lost its indentation."""
    try:
        return ast.parse(code, _NAME)
    except IndentationError:
        first, _, rest = code.partition("\n")
        indented = [line for line in rest.splitlines() if line.strip()]
        width = min((len(line) - len(line.lstrip()) for line in indented), default=0)
        if not width or first.rstrip().endswith(":"):
            raise
        return ast.parse("\n".join([first, *(line[width:] for line in rest.splitlines())]), _NAME)


def describe(error: BaseException) -> str:
    """Return the last line that Python prints for an error, with the line of the code that caused it."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == _NAME else None
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == _NAME:
            line = frame.tb_lineno
        frame = frame.tb_next
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    place = "" if line is None else f" (line {line})"
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"


def _prctl(option: int, value: int) -> None:
    _check(_LIBC.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3), "prctl")


def _check(result: int, call: str) -> int:
    """Return the result of a system call. Raises OSError where it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


if __name__ == "__main__":
    main()

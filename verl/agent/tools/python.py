"""The tool `python`: runs code of the policy, which reads its output and the value of its last expression."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

from verl.agent.tools.sandbox import Ending, Isolation, Sandbox, SandboxError, SandboxLimits
from verl.errors import ConfigError, ServiceError
from verl.protocols import FixedText, Tool, ToolResources
from verl.trainer.config.fields import positive
from verl.types import Observation, ToolSpec

logger = logging.getLogger(__name__)

_MAX_WAIT_S = 120.0
"""Longest wait of a call for a free process."""
_CUT = "\n[...]\n"


@dataclass
class PythonConfig:
    """Settings of the tool `python`."""

    timeout_s: float = positive(10.0)
    cpu_time_s: int = positive(5)
    memory_mib: int = positive(1024)
    folder_mib: int = positive(16)
    max_output_bytes: int = positive(65536)
    max_concurrent: int | None = positive(None)
    require_isolation: bool = True


class PythonTool(Tool):
    """The tool `python`: each call is a process of its own, and nothing of it is left for the next one."""

    section = "python"
    settings_class = PythonConfig
    texts: ClassVar[Mapping[str, FixedText]] = {
        "no_output": FixedText(),
        "out_of_time": FixedText(optional=("limit",)),
        "out_of_cpu_time": FixedText(optional=("limit",)),
        "too_much_output": FixedText(optional=("limit",)),
        "crashed": FixedText(),
    }

    def __init__(self, settings: PythonConfig, *, texts: Mapping[str, str], resources: ToolResources) -> None:
        """Start nothing: `connect` does."""
        self._settings = settings
        limits = SandboxLimits(
            timeout_s=settings.timeout_s,
            cpu_time_s=settings.cpu_time_s,
            memory_mib=settings.memory_mib,
            folder_mib=settings.folder_mib,
            max_output_bytes=settings.max_output_bytes,
        )
        self._sandbox = Sandbox(limits)
        most = settings.max_concurrent or len(os.sched_getaffinity(0))
        num_threads = max(1, most // resources.num_replicas)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="python-tool")
        self._notes = {
            Ending.OUT_OF_TIME: texts["out_of_time"].format(limit=f"{settings.timeout_s:g} s"),
            Ending.OUT_OF_CPU_TIME: texts["out_of_cpu_time"].format(limit=f"{settings.cpu_time_s} s"),
            Ending.TOO_MUCH_OUTPUT: texts["too_much_output"].format(limit=settings.max_output_bytes),
            Ending.CRASHED: texts["crashed"].format(),
        }
        self.spec = ToolSpec(
            name="python",
            description="run Python code and read what it prints and the value of its last line",
            parameters={"code": "Python code"},
            timeout_s=_MAX_WAIT_S + settings.timeout_s,
            empty_text=texts["no_output"].format(),
        )

    async def connect(self, timeout_s: float) -> Mapping[str, object]:  # noqa: ARG002 (its own limit is short)
        """Run a first program; return what isolates it, and the interpreter's version.

        Raises ConfigError where that is not enough, ServiceError where nothing can be run.
        """
        try:
            isolation = await asyncio.to_thread(self._sandbox.probe)
        except (SandboxError, OSError) as error:
            raise ServiceError("python", f"no code can be run: {error}") from error
        check_isolation(isolation, is_required=self._settings.require_isolation)
        return {"isolation": dataclasses.asdict(isolation), "version": platform.python_version()}

    async def call(
        self,
        arguments: Mapping[str, object],
        *,
        deadline: float,  # noqa: ARG002 (a process has a limit of its own, and waiting is limited by the spec)
    ) -> Observation:
        """Return what the code printed and why it was stopped, or the failure of the sandbox."""
        code = str(arguments["code"])
        try:
            run = await asyncio.get_running_loop().run_in_executor(self._threads, self._sandbox.run, code)
        except (SandboxError, OSError) as error:
            return Observation(failure=str(error))
        parts = (run.output.rstrip(), self._notes.get(run.ending, ""))
        return Observation(text="\n".join(filter(None, parts)))

    def shorten(self, observation: Observation, max_chars: int) -> Observation:
        """Return start and end of the output: the value and the error are its last lines."""
        text, kept = observation.text, max_chars - len(_CUT)
        if kept < 2:
            return replace(observation, text=text[:max_chars])
        if len(text) > max_chars:
            text = text[: kept // 2] + _CUT + text[len(text) - (kept - kept // 2) :]
        return replace(observation, text=text)

    async def aclose(self) -> None:
        """Wait for the programs that run; those that wait are not run."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)


def check_isolation(isolation: Isolation, *, is_required: bool) -> None:
    """Log what isolates the code. Raises ConfigError where that is required and not enough."""
    landlock = f"Landlock {isolation.landlock}" if isolation.landlock else ""
    names = {"namespaces": isolation.namespaces, landlock: isolation.landlock, "seccomp": isolation.seccomp}
    present = ", ".join(name for name, is_there in names.items() if is_there) or "limits of resources alone"
    if isolation.is_complete:
        logger.info("code of the policy is isolated by %s", present)
        return
    lacking = "seccomp" if not isolation.seccomp else "namespaces or Landlock"
    if is_required:
        raise ConfigError(
            f"python.require_isolation=true, but this machine isolates code by {present}, expected also "
            f"{lacking}; permit user namespaces or use a kernel with Landlock (Linux 5.13), or accept that "
            "code of the policy can do what this user can: python.require_isolation=false"
        )
    logger.warning(
        "code of the policy is isolated by %s, %s is missing: it can do what this user can", present, lacking
    )

"""Start a service for a benchmark and read its counters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from verl.utils.supervise import Supervisor, free_ports, service_environment, wait_until_ready

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "world"
START_TIMEOUT_S = 300.0


def start_service(
    supervisor: Supervisor,
    name: str,
    *,
    module: str,
    arguments: Sequence[str],
    log: Path,
    update: Callable[[int, str], None],
) -> str:
    """Run `python -m module` on a free port and wait until it is ready. Returns its URL.

    Raises ChildFailedError.
    """
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    service = supervisor.start(
        name,
        command=[sys.executable, "-P", "-m", module, "--port", str(port), *arguments],
        log=log,
        cwd=ROOT,
        environment=service_environment(),
    )
    for _ in wait_until_ready(
        {f"{url}/readyz": service},
        timeout_s=START_TIMEOUT_S,
        on_tick=lambda waiting: update(0, "waiting for " + " and ".join(child.name for child in waiting)),
    ):
        pass
    return url


def start_ig_service(
    supervisor: Supervisor, *, arguments: Sequence[str], log: Path, update: Callable[[int, str], None]
) -> str:
    """Start an IG service with the embedded world's models; return its URL. Raises ChildFailedError."""
    module = "IG.service.IG_server"
    return start_service(
        supervisor, "the IG service", module=module, arguments=arguments, log=log, update=update
    )


def read_counters(url: str) -> dict[str, float]:
    """Return the service's counters by name and labels, as Prometheus writes them."""
    lines = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}

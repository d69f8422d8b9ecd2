"""Start a service for a benchmark and read its counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from verl.utils.supervise import Supervisor, start_service

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "world"


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

"""Weights & Biases as a mirror of the metrics: never needed, never asking, never in the way.

Without a key it runs offline (`wandb sync` sends it later). What goes wrong is said once; training goes on.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from verl.utils.redaction import redact

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0


class WandbMirror:
    """A W&B run below the run folder that receives what the tracker writes."""

    def __init__(self, run_dir: Path, *, project: str, experiment: str, config: Mapping[str, object]) -> None:
        self._run: wandb.Run | None = None
        mode = wandb_mode(os.environ)
        if mode == "disabled":
            return
        if mode == "offline":
            logger.info(
                "W&B mirrors offline; send it later with: wandb sync %s", run_dir / "wandb" / "offline-run-*"
            )
        self._guarded("start", lambda: self._start(run_dir, mode, project, experiment, config))

    def _start(
        self, run_dir: Path, mode: str, project: str, experiment: str, config: Mapping[str, object]
    ) -> None:
        import wandb  # here, so that a run without W&B neither needs nor loads it

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_stats=True,
        )
        self._run = wandb.init(
            mode="offline" if mode == "offline" else "online",
            dir=str(run_dir),
            project=project,
            name=experiment,
            id=_run_id(run_dir),
            resume="allow" if mode == "online" else None,
            config=redact(dict(config)),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        run = self._run
        if run is not None:
            self._guarded("log", lambda: run.log({"step": step, **metrics}))

    def finish(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._guarded("finish", run.finish)

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except (
            Exception
        ) as error:  # a foreign service that is only a mirror: whatever it raises, training goes on
            self._run = None
            logger.warning(
                "W&B failed to %s (%s); the run goes on without it, metrics.jsonl has everything", what, error
            )


def wandb_mode(environ: Mapping[str, str]) -> str:
    """What WANDB_MODE says (online, offline, disabled), but never online without a key: W&B would ask."""
    mode = environ.get("WANDB_MODE", "").lower()
    if mode in ("disabled", "offline"):
        return mode
    if environ.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        return "disabled"
    if environ.get("WANDB_API_KEY") or _has_login(environ):
        return "online"
    if mode == "online":
        logger.warning("WANDB_MODE=online but there is no key; set WANDB_API_KEY. Going offline")
    return "offline"


def _has_login(environ: Mapping[str, str]) -> bool:
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(environ.get("NETRC", Path(environ.get("HOME", "~")) / ".netrc")).expanduser()
    try:
        return host is not None and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    """The same W&B run when a run folder is resumed."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(os.urandom(6).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()

"""Weights & Biases as a mirror of the metrics, which a run never needs or waits for.

Without a key, or when the server does not answer, it runs offline (`wandb sync` sends it later). A failure is
logged once, and training continues without the mirror.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from serving.redaction import redact
from verl.trainer.config.schema import TrainerConfig

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 10.0
FINISH_TIMEOUT_S = 60.0
_MAX_QUOTED_CHARS = 200


class WandbMirror:
    """A W&B run inside the run folder that receives what the tracker writes."""

    def __init__(self, run_dir: Path, settings: TrainerConfig, *, run_config: Mapping[str, object]) -> None:
        self._run: wandb.Run | None = None
        mode = wandb_mode(os.environ)
        if mode != "disabled":
            self._guarded("start", lambda: self._start(run_dir, mode, settings, run_config))

    def _start(
        self, run_dir: Path, mode: str, settings: TrainerConfig, run_config: Mapping[str, object]
    ) -> None:
        # W&B's reports about itself wait 10 s for a silent server, also in offline runs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # here, so that a run without W&B does not load it

        def start(*, online: bool) -> None:
            self._run = wandb.init(
                mode="online" if online else "offline",
                dir=str(run_dir),
                project=settings.project_name,
                name=settings.experiment_name,
                id=_run_id(run_dir),
                resume="allow" if online else None,  # ignored offline, with a warning
                config=redact(dict(run_config)),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=INIT_TIMEOUT_S,
                    finish_timeout=FINISH_TIMEOUT_S,
                    disable_git=True,
                    save_code=False,
                    x_disable_machine_info=True,
                    x_disable_stats=True,
                ),
            )

        # The server is tried once at start: a run that goes offline stays so, and never waits for it again.
        if mode == "online":
            try:
                start(online=True)
            except wandb.Error as error:
                failure = " ".join(str(error).split())[:_MAX_QUOTED_CHARS]
                logger.warning("W&B cannot be used (%s); going offline", failure)
                wandb.teardown()  # or the failed run still holds the id
        if self._run is None:
            synced = run_dir / "wandb" / "offline-run-*"
            logger.info("W&B mirrors offline; send it later with: wandb sync %s", synced)
            start(online=False)
        assert self._run is not None
        # The x axis is the step of the run, not W&B's number of calls of log.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of one step."""
        run = self._run
        if run is not None:
            self._guarded("log", lambda: run.log({"step": step, **metrics}))

    def finish(self) -> None:
        """End the W&B run. Calling it again does nothing."""
        run, self._run = self._run, None
        if run is not None:
            self._guarded("finish", run.finish)

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # W&B is only a mirror: no error of it may end the run
            self._run = None
            logger.warning(
                "W&B failed to %s (%s); the run continues without it, metrics.jsonl has everything",
                what,
                error,
            )


def wandb_mode(environ: Mapping[str, str]) -> str:
    """Return WANDB_MODE (online, offline, disabled), but never online without a key: W&B would ask for it."""
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
    """Return the id that a resumed run folder keeps."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(os.urandom(6).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()

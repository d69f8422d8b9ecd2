"""Weights & Biases as a mirror of the metrics: never needed, never asking, never in the way.

Without a key, or when the server does not answer, it runs offline (`wandb sync` sends it later). A failure is
logged once; training goes on.
"""

from __future__ import annotations

import logging
import netrc
import os
import ssl
import threading
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from serving.redaction import redact

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0
_MAX_QUOTED_CHARS = 200


class WandbMirror:
    """A W&B run below the run folder that receives what the tracker writes."""

    def __init__(self, run_dir: Path, *, project: str, experiment: str, config: Mapping[str, object]) -> None:
        self._run: wandb.Run | None = None
        mode = wandb_mode(os.environ)
        if mode != "disabled":
            self._guarded("start", lambda: self._start(run_dir, mode, project, experiment, config))

    def _start(
        self, run_dir: Path, mode: str, project: str, experiment: str, config: Mapping[str, object]
    ) -> None:
        # W&B's reports about itself wait 10 s for a silent server, offline runs included.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
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

        def start(*, online: bool) -> None:
            self._run = wandb.init(
                mode="online" if online else "offline",
                dir=str(run_dir),
                project=project,
                name=experiment,
                id=_run_id(run_dir),
                resume="allow" if online else None,
                config=redact(dict(config)),
                settings=settings,
            )

        if mode == "online":
            failure = _find_failure(wandb.setup(settings).settings.base_url)
            try:
                if failure is None:
                    start(online=True)
            except wandb.Error as error:
                failure = " ".join(str(error).split())[:_MAX_QUOTED_CHARS]
                wandb.teardown()  # else the failed run still holds the id
            if failure is not None:
                logger.warning("W&B cannot be used (%s); going offline", failure)
        if self._run is None:
            synced = run_dir / "wandb" / "offline-run-*"
            logger.info("W&B mirrors offline; send it later with: wandb sync %s", synced)
            start(online=False)
        assert self._run is not None
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


def _find_failure(base_url: str) -> str | None:
    """Return why the server at `base_url` cannot be used, None if it answers within PROBE_TIMEOUT_S.

    W&B's client itself keeps trying for all of INIT_TIMEOUT_S. The thread bounds name resolution, too.
    """
    failure: list[str | None] = [f"{base_url} did not answer within {PROBE_TIMEOUT_S:g} s"]

    def probe() -> None:
        try:
            urlopen(f"{base_url}/graphql", timeout=PROBE_TIMEOUT_S).close()
            failure[0] = None
        except HTTPError as error:  # a refusal is an answer; 5xx comes from a proxy that finds no server
            failure[0] = f"{base_url}: {error}" if error.code >= 500 else None
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            # W&B has certificates of its own and may accept this one.
            is_answer = isinstance(reason, ssl.SSLCertVerificationError)
            failure[0] = None if is_answer else f"{base_url}: {reason}"

    thread = threading.Thread(target=probe, name="wandb-probe", daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return failure[0]


def _run_id(run_dir: Path) -> str:
    """The same W&B run when a run folder is resumed."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(os.urandom(6).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()

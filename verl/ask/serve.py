"""The settings of the endpoint, and its life as a process."""

from __future__ import annotations

import argparse
import logging
import os

from serving.machine import is_loopback
from serving.web.server import GracefulServer, listen, url_of
from verl.ask.asker import AskSettings
from verl.ask.checkpoint import find_checkpoint
from verl.ask.output import Output
from verl.ask.server import create_app
from verl.ask.session import start
from verl.ask.settings import TOKEN_VARIABLE, resolve_server
from verl.errors import RolloutError

logger = logging.getLogger(__name__)


def serve(options: argparse.Namespace, output: Output) -> int:
    """Serve until SIGINT or SIGTERM. Raises what keeps it from starting."""
    settings = resolve_server(vars(options), os.environ)
    os.environ.pop(TOKEN_VARIABLE, None)  # so that child processes do not inherit it
    logger.setLevel(logging.INFO)
    checkpoint = find_checkpoint(options.model)
    with listen(settings.host, settings.port, env="ASK_PORT") as listener:
        url = url_of(settings.host, listener.getsockname()[1])
        app = create_app(
            lambda: start(options, checkpoint),
            model=checkpoint.name,
            settings=settings,
            defaults=AskSettings(temperature=options.temperature),
            on_ready=lambda: logger.info(
                "ready: page %s/, OpenAI %s/v1, model %s", url, url, checkpoint.name
            ),
            on_failure=lambda: server.stop_at_once(),
        )
        if not settings.token and not is_loopback(settings.host):
            logger.warning("any host that reaches %s may ask; set %s to require a token", url, TOKEN_VARIABLE)
        server = GracefulServer(app, host=app.state.host, grace_s=settings.shutdown_grace_s)
        logger.info("loading %s (%s)", checkpoint.name, checkpoint.model)
        server.run_on(listener)
    error = app.state.host.start_error
    if isinstance(error, RolloutError):
        output.explain(error)
    if error is not None:
        raise error
    return 0

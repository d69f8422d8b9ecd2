"""Service calls of the trainer follow `serving.http` (retries, one deadline); here its errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serving import http
from verl.errors import ConfigError, ServiceError


@contextmanager
def translated_calls() -> Iterator[None]:
    """A failed call is a ServiceError."""
    try:
        yield
    except http.CallError as error:
        raise ServiceError(error.service, error.message) from error


@contextmanager
def translated_settings() -> Iterator[None]:
    """A setting that a client refuses is a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error

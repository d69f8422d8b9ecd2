"""Translate the errors of `serving.http` into those of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serving import http
from verl.errors import ConfigError, ServiceError


@contextmanager
def translated_calls() -> Iterator[None]:
    """Raise ServiceError for a failed call."""
    try:
        yield
    except http.CallError as error:
        raise ServiceError(error.service, error.message, status=error.status) from error


@contextmanager
def translated_settings() -> Iterator[None]:
    """Raise ConfigError for a setting that a client refuses."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error

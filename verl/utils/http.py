"""Service calls of the trainer: the policy of `IG.http` (retries, one deadline), its errors in our words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from IG import http
from verl.errors import ConfigError, ServiceError


class JsonService:
    """Client of one service. Keep one per event loop and close it."""

    def __init__(
        self, base_url: str, *, name: str, timeout_s: float, fix: str = "check that it runs at this URL"
    ) -> None:
        """`timeout_s` covers a whole call with all attempts; `fix` ends messages about a dead service.

        Raises ConfigError for a bad URL or timeout.
        """
        with translated_settings():
            self._service = http.JsonService(base_url, name=name, timeout_s=timeout_s, fix=fix)

    async def post(self, path: str, payload: Mapping[str, object]) -> dict[str, object]:
        """Send `payload` as JSON. Raises ServiceError at the deadline at the latest."""
        with translated_calls():
            return await self._service.post(path, payload)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._service.aclose()


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

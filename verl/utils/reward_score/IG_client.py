"""The trainer's client of the information-gain service: that of `IG`, its errors in the trainer's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from IG.client import GainRequest, GainResult
from IG.client import IGClient as _IGClient
from verl.utils.http import translated_calls, translated_settings

__all__ = ["GainRequest", "GainResult", "IGClient"]


class IGClient:
    """Asks for gains, many at once or one by one; what failed is a named error in its result."""

    def __init__(
        self, url: str, *, timeout_s: float, batch_size: int = 256, token: str | None = None
    ) -> None:
        """`timeout_s` covers a call from asking to the last result. Raises ConfigError for a bad setting."""
        with translated_settings():
            self._client = _IGClient(url, timeout_s=timeout_s, batch_size=batch_size, token=token)

    @property
    def work(self) -> Mapping[str, int]:
        """The service's own account of all work it did for this client so far."""
        return dict(self._client.work)

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        """One result per request, in order."""
        return await self._client.compute(requests, timeout_s=timeout_s)

    async def submit(self, request: GainRequest) -> GainResult:
        """The result of one request, which travels with others that are asked for meanwhile."""
        return await self._client.submit(request)

    async def wait_ready(self, deadline_s: float) -> dict[str, object]:
        """The service's health as soon as it can work. Raises ServiceError that names what to start."""
        with translated_calls():
            return await self._client.wait_ready(deadline_s)

    async def describe(self) -> dict[str, object] | None:
        """What the service's numbers depend on; None from one that does not say. Raises ServiceError."""
        with translated_calls():
            return await self._client.describe()

    async def aclose(self) -> None:
        """Stop what is under way and close all connections."""
        await self._client.aclose()

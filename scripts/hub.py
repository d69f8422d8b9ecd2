"""What a Hugging Face hub, or a mirror of it, says of a file, and its content from any byte on.

The hub names size and hash of a file in the answer to HEAD: `X-Linked-Size` and `X-Linked-Etag`, the SHA-256,
for large files, `Content-Length` and `ETag`, git's SHA-1, for small ones. Addresses that it redirects to are
signed, so messages name the hub's own.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, Protocol
from urllib.parse import quote

import httpx

from serving.http import parse_retry_after

_MAX_REDIRECTS = 5
_LONGEST_PAUSE_S = 30.0
_LONGEST_OBEYED_S = 900.0


class DownloadError(RuntimeError):
    """Names the file, what was found, what was expected and the fix."""


class PassingError(Exception):
    """Another attempt may go better."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Hasher(Protocol):
    """What hashlib gives."""

    def update(self, content: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """A published hash."""

    kind: str
    """`sha256`, or `git-sha1` for small files."""
    value: str

    def new_hasher(self, size: int) -> Hasher:
        """For the content of a file of `size` bytes."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """What the hub says of a file."""

    name: str
    url: str
    size: int
    digest: Digest | None
    commit: str | None


class Hub:
    """A connection to `endpoint`. Close it."""

    def __init__(
        self, endpoint: str, *, token: str | None, timeout_s: float, max_failures: int, pause_s: float = 1.0
    ) -> None:
        """`timeout_s` without any byte is a failure; `max_failures` in a row without progress end it.

        Raises DownloadError for an address or a token that cannot be one.
        """
        if not endpoint.startswith(("http://", "https://")):
            raise DownloadError(
                f"--endpoint (HF_ENDPOINT) is {endpoint!r}, expected something like https://host"
            )
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise DownloadError("HF_TOKEN holds characters that no token has; expected one line of ASCII")
        self._endpoint = endpoint.rstrip("/")
        self._max_failures = max_failures
        self._pause_s = pause_s
        self._has_token = bool(token)
        # httpx drops Authorization where a redirect leaves the host.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.client = httpx.Client(timeout=timeout_s, headers=headers, follow_redirects=False)

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def look_up(self, name: str, *, repo: str, repo_type: str, revision: str) -> RemoteFile:
        """Size and hash. Raises DownloadError."""
        folder = "datasets/" if repo_type == "dataset" else ""
        url = f"{self._endpoint}/{folder}{repo}/resolve/{quote(revision, safe='')}/{quote(name)}"
        return self.insist(lambda: self._look_up_once(name, url), progress=lambda: 0)

    def insist(self, attempt: Callable[[], RemoteFile], *, progress: Callable[[], int]) -> RemoteFile:
        """`attempt` again and again while it gets further. Raises DownloadError."""
        best, failures = progress(), 0
        while True:
            try:
                return attempt()
            except PassingError as error:
                failures = 1 if progress() > best else failures + 1
                best = max(best, progress())
                asked_s = error.retry_after_s
                if failures >= self._max_failures or (asked_s or 0.0) > _LONGEST_OBEYED_S:
                    gave_up = f"gave up after {failures} attempts without progress; run again to go on"
                    raise DownloadError(f"{error}; {gave_up}") from error
                wait_s = min(self._pause_s * 2 ** (failures - 1), _LONGEST_PAUSE_S)
                time.sleep(wait_s if asked_s is None else asked_s)

    @contextmanager
    def open(self, remote: RemoteFile, *, start: int) -> Iterator[httpx.Response]:
        """The content of `remote` from byte `start` on; the server may send it from byte 0. Any status."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            with self.client.stream("GET", remote.url, headers=headers, follow_redirects=True) as answer:
                yield answer
        except httpx.RequestError as error:
            raise PassingError(f"{remote.name}: {remote.url}: {_name(error)}") from error

    def refuse(self, name: str, url: str, answer: httpx.Response) -> NoReturn:
        """Raises what the status means."""
        status = answer.status_code
        told = f"{name}: {url} answered {status}"
        if status in (408, 416, 429) or status >= 500:
            raise PassingError(told, retry_after_s=parse_retry_after(answer.headers.get("Retry-After")))
        if status in (401, 403):
            sent = "the token in HF_TOKEN does not open it" if self._has_token else "no token was sent"
            raise DownloadError(
                f"{told}: {sent}; expected a public repository, or HF_TOKEN set to a token that may read it"
            )
        if status == 404:
            raise DownloadError(f"{told}: expected a file there; check repository, file name and --revision")
        raise DownloadError(f"{told}, expected 200; check --endpoint")

    def _look_up_once(self, name: str, url: str) -> RemoteFile:
        asked = url
        for _ in range(_MAX_REDIRECTS):
            try:
                answer = self.client.head(asked)
            except httpx.RequestError as error:
                raise PassingError(f"{name}: {url}: {_name(error)}") from error
            if not answer.has_redirect_location or "X-Linked-Size" in answer.headers:
                break
            # Renamed repositories, and mirrors that lead on to the hub.
            asked = str(httpx.URL(asked).join(answer.headers["Location"]))
        if answer.status_code >= 400 or (answer.is_redirect and "X-Linked-Size" not in answer.headers):
            self.refuse(name, url, answer)
        size = answer.headers.get("X-Linked-Size") or answer.headers.get("Content-Length") or ""
        if not size.isdecimal():
            raise DownloadError(f"{name}: {url} names no size; expected Content-Length; check --endpoint")
        etag = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag") or ""
        return RemoteFile(
            name=name,
            url=url,
            size=int(size),
            digest=read_digest(etag),
            commit=answer.headers.get("X-Repo-Commit"),
        )


def read_digest(etag: str) -> Digest | None:
    """The hash in an ETag of the hub; None when it is something else."""
    value = etag.strip().removeprefix("W/").strip('"').lower()
    if re.fullmatch(r"[0-9a-f]{64}", value):
        return Digest(kind="sha256", value=value)
    return Digest(kind="git-sha1", value=value) if re.fullmatch(r"[0-9a-f]{40}", value) else None


def _name(error: httpx.RequestError) -> str:
    return f"{type(error).__name__} {error}".strip()

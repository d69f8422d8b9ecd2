"""Fetch the published corpus and index (Wikipedia 2018, 21 million passages, E5) and put them together.

  python scripts/download.py --save_path data/wiki-18
  python scripts/download.py --save_path data/wiki-18 --what corpus
  HF_ENDPOINT=https://mirror.example python scripts/download.py --save_path data/wiki-18

Run it again after an interruption: it continues where it stopped. When everything is there it needs no
network: size, SHA-256 and source of each file are kept beside it in FILE.source.json, and a file that differs
is refused (by its size; with --verify by its hash).
Every part is checked by the SHA-256 that the hub names (or --sha256) and then appended to one file, so
joining takes the room of one part at most. A token, where one is needed, is read from HF_TOKEN.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console
from rich.filesize import decimal

from serving.files import lock_file, replacing_file, sha256_of_file, write_json_atomically
from serving.web.settings import expand_home
from verl.errors import UserError
from verl.utils.entry import error_line

UNPACKED_PER_PACKED = 3.0
"""Of a gzipped text corpus; the size of a large one is not in the archive."""
_BLOCK = 1 << 22


class DownloadError(UserError):
    """Names the file, what was found, what was expected and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file of a repository."""

    name: str
    size: int
    digest: str | None
    """SHA-256, or git's SHA-1 of a small file; None when the hub names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One file to make: the parts of a repository in order, unpacked if packed."""

    name: str
    repo: str
    parts: tuple[str, ...]

    @property
    def is_packed(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].endswith(".gz")


class Downloader:
    """Makes targets in a folder."""

    def __init__(self, settings: argparse.Namespace, *, console: Console) -> None:
        self._settings = settings
        self._folder: Path = settings.save_path
        self._digests = read_checksums(settings.sha256)
        self._hub = {
            "repo_type": settings.repo_type,
            "revision": settings.revision,
            "endpoint": settings.endpoint,
        }
        self._console = console

    def require_known_names(self, targets: Sequence[Target]) -> None:
        """Raise DownloadError for a hash of a file that is not loaded or made: nothing would be compared."""
        known = {name for target in targets for name in (target.name, *target.parts)}
        if unknown := sorted(self._digests.keys() - known):
            raise DownloadError(f"--sha256 {unknown[0]}: expected one of {', '.join(sorted(known))}")

    def make(self, target: Target) -> None:
        """Make one file. Raises DownloadError; what was loaded by then is kept for the next run."""
        path = self._folder / target.name
        record_path = self._folder / f"{target.name}.source.json"
        if not path.is_file():
            parts = self._look_up_all(target)
            self._check_room(target, parts)
            self._join(target, parts, path, record_path=record_path)
            how = self._describe_check(target, parts)
        elif record_path.is_file():
            how = self._check_record(target, path, record_path=record_path)
        else:
            parts = self._check_unrecorded(target, path)
            self._keep_record(target, path, made_of=path, record_path=record_path)
            how = self._describe_check(target, parts)
        self._console.print(f"{path}: {path.stat().st_size:,} bytes, {how}")

    def _describe_check(self, target: Target, parts: Sequence[Part]) -> str:
        is_checked = target.name in self._digests or all(part.digest is not None for part in parts)
        return "checked" if is_checked else "not checked, as there is no hash"

    def _source(self, target: Target) -> dict[str, object]:
        settings = self._settings
        parts = list(target.parts)
        return {
            "repo": target.repo,
            "revision": settings.revision,
            "type": settings.repo_type,
            "parts": parts,
        }

    def _keep_record(self, target: Target, path: Path, *, made_of: Path, record_path: Path) -> None:
        """Write the record of a file. Raises DownloadError, which names `made_of`, unless --sha256 fits."""
        digest, size = sha256_of_file(path), path.stat().st_size
        self._check_given(target, made_of, digest)
        write_json_atomically(record_path, {"sha256": digest, "size": size, "source": self._source(target)})

    def _check_record(self, target: Target, path: Path, *, record_path: Path) -> str:
        """Compare a file with its record, without the hub. Raises DownloadError."""
        try:
            record = json.loads(record_path.read_text("utf-8"))
            source, digest, size = record["source"], str(record["sha256"]), int(record["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise DownloadError(
                f"{record_path} is no record of a download ({error!r}); delete it and run again"
            ) from error
        if source != self._source(target):
            raise DownloadError(
                f"{path} was made of {source}, expected {self._source(target)}; delete it and "
                f"{record_path.name}, or choose another --save_path"
            )
        recorded = Part(name=target.name, size=size, digest=digest)
        check_pieces(path, [recorded], by_size_only=not self._settings.verify)
        self._check_given(target, path, digest)
        return "verified" if self._settings.verify else "already there, not read again (--verify does)"

    def _check_unrecorded(self, target: Target, path: Path) -> list[Part]:
        """Check a file that has no record: by the hashes of its parts, which are returned, or by --sha256."""
        if not target.is_packed:
            parts = self._look_up_all(target)
            check_pieces(path, parts)
            return parts
        if target.name not in self._digests:
            raise DownloadError(
                f"{path} is there without a record of where it is from, so it cannot be checked; delete it "
                f"and run again, or give its hash with --sha256 {target.name}=..."
            )
        return []

    def _check_given(self, target: Target, path: Path, digest: str) -> None:
        expected = self._digests.get(target.name, digest)
        if digest != expected:
            raise DownloadError(
                f"{path}: its hash is {digest}, expected {expected}; delete it and run again, or correct "
                "--sha256"
            )

    def _look_up_all(self, target: Target) -> list[Part]:
        with naming_hub(self._settings.endpoint, target.repo):
            return [self._look_up(target, name) for name in target.parts]

    def _look_up(self, target: Target, name: str) -> Part:
        facts = get_hf_file_metadata(hf_hub_url(target.repo, name, **self._hub))
        etag = (facts.etag or "").strip('"').lower()
        named = etag if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", etag) else None
        digest = self._digests.get(name) or named
        if digest is None and not self._settings.allow_unchecked:
            raise DownloadError(
                f"{name}: {self._settings.endpoint} names no hash of it, expected one; give it with "
                f"--sha256 {name}=..., or go without by --allow_unchecked"
            )
        return Part(name=name, size=int(facts.size or 0), digest=digest)

    def _join(self, target: Target, parts: Sequence[Part], path: Path, *, record_path: Path) -> None:
        """Make the file of all parts: each is downloaded, checked, appended and removed.

        The record is written before the file gets its name: an interruption leaves no file without one.
        """
        # The name identifies the revision, so that bytes of another one are never continued.
        source = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
        joined = self._folder / f"{target.name}.{source}.partial"
        joined.touch()
        done = 0
        for part in parts:
            if joined.stat().st_size < done + part.size or part.size == 0:
                with joined.open("r+b") as out:
                    out.truncate(done)  # a kill may have left a piece of this part
                    out.seek(done)
                    self._append(target, part, out=out)
            done += part.size
        if target.is_packed:
            with replacing_file(path) as unpacked:
                unpack(joined, unpacked)
                self._keep_record(target, unpacked, made_of=joined, record_path=record_path)
            joined.unlink()
        else:
            self._keep_record(target, joined, made_of=joined, record_path=record_path)
            joined.replace(path)
        shutil.rmtree(self._folder / ".parts", ignore_errors=True)

    def _append(self, target: Target, part: Part, *, out: BinaryIO) -> None:
        with naming_hub(self._settings.endpoint, target.repo):
            parts = self._folder / ".parts"
            path = Path(hf_hub_download(target.repo, part.name, local_dir=parts, **self._hub))
        try:
            check_pieces(path, [part])
        except DownloadError:
            path.unlink()
            raise
        with path.open("rb") as content:
            shutil.copyfileobj(content, out, _BLOCK)
        out.flush()
        os.fsync(out.fileno())
        path.unlink()

    def _check_room(self, target: Target, parts: Sequence[Part]) -> None:
        packed = sum(part.size for part in parts)
        needed = packed * (1 + UNPACKED_PER_PACKED) if target.is_packed else packed + parts[-1].size
        present = sum(path.stat().st_size for path in self._folder.glob(f"{target.name}.*.partial"))
        free = shutil.disk_usage(self._folder).free
        if needed - present > free:
            raise DownloadError(
                f"{target.name}: {self._folder} has {decimal(free)} free, expected about "
                f"{decimal(int(needed - present))}; make room or choose another --save_path"
            )


def check_pieces(path: Path, pieces: Sequence[Part], *, by_size_only: bool = False) -> None:
    """Raise DownloadError unless the file consists of these pieces."""
    size, expected = path.stat().st_size, sum(piece.size for piece in pieces)
    if size != expected:
        raise DownloadError(f"{path} has {size:,} bytes, expected {expected:,}; delete it and run again")
    with path.open("rb") as content:
        for piece in pieces if not by_size_only else ():
            is_git = piece.digest is not None and len(piece.digest) == 40
            digest = hashlib.sha1(b"blob %d\0" % piece.size) if is_git else hashlib.sha256()
            left = piece.size
            while left and (block := content.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            if piece.digest is not None and digest.hexdigest() != piece.digest:
                raise DownloadError(
                    f"{path}: the hash of {piece.name} is {digest.hexdigest()}, expected {piece.digest}; "
                    "delete it and run again, or name another --endpoint"
                )


def unpack(archive: Path, path: Path) -> None:
    """Unpack a gzip file. Raises DownloadError for a damaged one."""
    try:
        with gzip.open(archive) as text, path.open("wb") as out:
            shutil.copyfileobj(text, out, _BLOCK)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DownloadError(
            f"{archive} cannot be unpacked ({error}), expected a whole gzip file; delete it and run again"
        ) from error


@contextmanager
def naming_hub(endpoint: str, repo: str) -> Iterator[None]:
    """Turn the hub's errors into DownloadErrors with a fix."""
    where = f"{endpoint}: {repo}"
    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise DownloadError(
            f"{where}: no such repository, or it is not public; check its name and --repo_type, or set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except (RemoteEntryNotFoundError, RevisionNotFoundError) as error:
        raise DownloadError(f"{where}: no such file; check the file name and --revision") from error
    except DownloadError:
        raise
    except Exception as error:  # the hub client and its HTTP library share no class
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"{where}: {first_line}; check the network and --endpoint, and run again to continue"
        ) from error


def read_checksums(flags: Sequence[str]) -> dict[str, str]:
    """Return the hashes of `NAME=HEX` flags. Raises DownloadError."""
    digests = {}
    for name, _, value in (flag.partition("=") for flag in flags):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise DownloadError(f"--sha256 {name}: {value!r} is no SHA-256; expected 64 hexadecimal digits")
        digests[name] = value.lower()
    return digests


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--save_path", required=True, type=Path, help="folder to download into")
    add("--what", choices=["index", "corpus", "all"], default="all", help="default: all")
    add("--index_repo", default="PeterJinGo/wiki-18-e5-index")
    add("--index_files", nargs="+", default=["part_aa", "part_ab"], help="parts, in order")
    add("--index_name", default="wiki-18-e5_Flat.index", help="file that the parts are joined to")
    add("--corpus_repo", default="PeterJinGo/wiki-18-corpus")
    add("--corpus_file", default="wiki-18.jsonl.gz", help="unpacked when it ends in .gz")
    add("--repo_type", choices=["dataset", "model"], default="dataset")
    add("--revision", default="main", help="branch, tag or commit")
    endpoint = constants.ENDPOINT
    add("--endpoint", default=endpoint, help=f"hub or mirror (HF_ENDPOINT; now {endpoint})")
    add("--sha256", action="append", default=[], metavar="NAME=HEX", help="expected hash of a part or result")
    add("--allow_unchecked", action="store_true", help="also take files for which there is no hash")
    add("--verify", action="store_true", help="compare the hash of files that are there")
    return parser.parse_args(expand_home(arguments))


def download(settings: argparse.Namespace, *, console: Console) -> None:
    """Make everything that `settings` ask for. Raises DownloadError."""
    corpus = Target(
        name=Path(settings.corpus_file.removesuffix(".gz")).name,
        repo=settings.corpus_repo,
        parts=(settings.corpus_file,),
    )
    index = Target(name=settings.index_name, repo=settings.index_repo, parts=tuple(settings.index_files))
    # The corpus first: the smaller one shows sooner whether all is well.
    targets = {"corpus": [corpus], "index": [index], "all": [corpus, index]}[settings.what]
    folder = settings.save_path
    another = DownloadError(f"another download is running in {folder}; wait for it, or stop it")
    with lock_file(folder / ".download.lock", taken=another):
        downloader = Downloader(settings, console=console)
        downloader.require_known_names(targets)
        for target in targets:
            downloader.make(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if all is there, 130 if interrupted; exit with one line for an error."""
    settings = parse_arguments(arguments)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with error_line():
        try:
            download(settings, console=console)
        except KeyboardInterrupt:
            console.print("interrupted; run the same command again to continue")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

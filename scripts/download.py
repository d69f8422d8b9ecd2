"""Fetch the published corpus and index (Wikipedia 2018, 21 million passages, E5) and put them together.

  python scripts/download.py --save_path data/wiki-18
  python scripts/download.py --save_path data/wiki-18 --what corpus
  HF_ENDPOINT=https://mirror.example python scripts/download.py --save_path data/wiki-18

Run it again after an interruption: it continues where it stopped, and does nothing when everything is there.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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

from serving.files import lock_file, replacing_file, write_json_atomically
from serving.web.settings import expand_home

RECEIPTS = "download.json"
UNPACKED_PER_PACKED = 3.0
"""Of a gzipped text corpus; the size of a large one is not in the archive."""
_BLOCK = 1 << 22


class DownloadError(RuntimeError):
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
        return len(self.parts) == 1 and self.parts[0].endswith(".gz") and not self.name.endswith(".gz")


class Downloader:
    """Makes targets in a folder."""

    def __init__(self, settings: argparse.Namespace, *, console: Console) -> None:
        self._settings = settings
        self._folder: Path = settings.save_path
        self._digests = read_checksums(settings.sha256, settings.checksums)
        self._console = console

    def make(self, target: Target) -> None:
        """Raises DownloadError; what was loaded by then is kept for the next run."""
        path = self._folder / target.name
        receipts = self._read_receipts()
        source: dict[str, object] = {"repo": target.repo, "names": list(target.parts)}
        if path.is_file() and target.name in receipts:
            self._check_receipt(path, receipts[target.name], source=source)
            return
        with naming_hub(self._settings.endpoint, target.repo):
            parts = [self._look_up(target, name) for name in target.parts]
        pieces = parts
        if path.is_file():
            if target.is_packed:
                raise DownloadError(
                    f"{path} is there, but {RECEIPTS} does not name it, and the hub has no hash of the "
                    "unpacked corpus; use it as it is, or move it away"
                )
            check_pieces(path, parts)
        else:
            self._check_room(target, parts)
            joined = self._join(target, parts)
            if target.is_packed:
                pieces = [unpack(joined, path)]
                archive = self._folder / Path(target.parts[0]).name
                joined.replace(archive) if self._settings.keep_archive else joined.unlink()
            else:
                joined.replace(path)
            shutil.rmtree(self._folder / ".parts", ignore_errors=True)
        if (expected := self._digests.get(target.name)) is not None:
            check_pieces(path, [Part(name=target.name, size=path.stat().st_size, digest=expected)])
        receipts[target.name] = {**source, "pieces": [asdict(piece) for piece in pieces]}
        write_json_atomically(self._folder / RECEIPTS, receipts)
        self._console.print(f"{path}: {path.stat().st_size:,} bytes, checked")

    def _look_up(self, target: Target, name: str) -> Part:
        settings = self._settings
        url = hf_hub_url(
            target.repo,
            name,
            repo_type=settings.repo_type,
            revision=settings.revision,
            endpoint=settings.endpoint,
        )
        facts = get_hf_file_metadata(url, endpoint=settings.endpoint)
        etag = (facts.etag or "").strip('"').lower()
        digest = self._digests.get(name) or (
            etag if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", etag) else None
        )
        if digest is None and not settings.allow_unchecked:
            raise DownloadError(
                f"{name}: {settings.endpoint} names no hash of it, expected one; give it with "
                f"--sha256 {name}=..., or go without by --allow_unchecked"
            )
        return Part(name=name, size=int(facts.size or 0), digest=digest)

    def _join(self, target: Target, parts: Sequence[Part]) -> Path:
        """Return the file of all parts: each is downloaded, checked, appended and removed."""
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
        return joined

    def _append(self, target: Target, part: Part, *, out: BinaryIO) -> None:
        settings = self._settings
        with naming_hub(settings.endpoint, target.repo):
            path = Path(
                hf_hub_download(
                    target.repo,
                    part.name,
                    repo_type=settings.repo_type,
                    revision=settings.revision,
                    endpoint=settings.endpoint,
                    local_dir=self._folder / ".parts",
                )
            )
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

    def _check_receipt(self, path: Path, receipt: dict[str, object], *, source: Mapping[str, object]) -> None:
        if {name: receipt.get(name) for name in source} != source:
            raise DownloadError(
                f"{path} was made of {receipt.get('repo')} {receipt.get('names')}, expected {source['repo']} "
                f"{source['names']}; delete it or choose another --save_path"
            )
        pieces = [Part(**piece) for piece in receipt["pieces"]]  # type: ignore[attr-defined]
        check_pieces(path, pieces, by_size_only=not self._settings.verify)
        how = "verified" if self._settings.verify else "not read again (--verify does)"
        self._console.print(f"{path}: there already, {how}")

    def _read_receipts(self) -> dict[str, dict[str, object]]:
        path = self._folder / RECEIPTS
        try:
            return dict(json.loads(path.read_text())) if path.is_file() else {}
        except ValueError as error:
            raise DownloadError(
                f"{path} is not what this script wrote ({error}); delete it, and its files are checked again"
            ) from error


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


def unpack(archive: Path, path: Path) -> Part:
    """Unpack a gzip file. Raises DownloadError for a damaged one."""
    digest = hashlib.sha256()
    try:
        with replacing_file(path) as partial, gzip.open(archive) as text, partial.open("wb") as out:
            while block := text.read(_BLOCK):
                out.write(block)
                digest.update(block)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DownloadError(
            f"{archive} cannot be unpacked ({error}), expected a whole gzip file; delete it and run again"
        ) from error
    return Part(name=path.name, size=path.stat().st_size, digest=digest.hexdigest())


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


def read_checksums(texts: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    """Return the hashes of `NAME=HEX` flags and of the `HEX  NAME` lines of files, as sha256sum writes."""
    pairs = [(name, value) for name, _, value in (text.partition("=") for text in texts)]
    for file in files:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DownloadError(f"--checksums {file} cannot be read ({error})") from error
        split = (line.split(maxsplit=1) for line in lines if line.strip())
        pairs += [(Path(name.removeprefix("*")).name, value) for value, name in split]
    for name, value in pairs:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise DownloadError(f"--sha256 {name}: {value!r} is no SHA-256; expected 64 hexadecimal digits")
    return {name: value.lower() for name, value in pairs}


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
    add("--checksums", action="append", default=[], metavar="FILE", help="the same, as sha256sum writes it")
    add("--allow_unchecked", action="store_true", help="also take files for which there is no hash")
    add("--keep_archive", action="store_true", help="keep the packed corpus beside the unpacked one")
    add("--verify", action="store_true", help="read finished files again and compare their hash")
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
    try:
        folder = settings.save_path
        another = DownloadError(f"another download is running in {folder}; wait for it, or stop it")
        with lock_file(folder / ".download.lock", taken=another):
            downloader = Downloader(settings, console=console)
            for target in targets:
                downloader.make(target)
    except OSError as error:
        raise DownloadError(
            f"{error.filename or settings.save_path}: {error.strerror}; make room or choose another "
            "--save_path"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all is there, 1 something is not and why, 130 interrupted."""
    settings = parse_arguments(arguments)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        download(settings, console=console)
    except DownloadError as error:
        console.print(f"download: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to continue")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

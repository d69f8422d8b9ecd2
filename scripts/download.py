"""Fetch the published corpus and index (Wikipedia 2018, 21 million passages, E5) and put them together.

  python scripts/download.py --save_path data/wiki-18
  python scripts/download.py --save_path data/wiki-18 --what corpus
  HF_ENDPOINT=https://mirror.example python scripts/download.py --save_path data/wiki-18

Run it again after an interruption: it goes on where it stopped, and does nothing when everything is there.
Parts are appended to one file as they arrive, so joining takes no room of its own. That file is not called
e5_Flat.index: the published `cat part_* > e5_Flat.index`, which is not needed, would empty it. Where there is
one already, --index_name e5_Flat.index checks and keeps it. Every part is checked by the SHA-256 that the hub
names (or --sha256), the unpacked corpus by the checksum inside the archive. A token, where one is needed, is
read from HF_TOKEN.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hub import Digest, DownloadError, Hub, RemoteFile, read_digest
from hub_files import (
    Piece,
    find_fault,
    join_parts,
    locate_notes,
    locate_partial,
    unpack,
    write_json,
)
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from serving.web.settings import expand_home

RECEIPTS = "download.json"
LOCK = ".download.lock"
DEFAULT_ENDPOINT = "https://huggingface.co"
UNPACKED_PER_PACKED = 3.0
"""What gzip makes of a text corpus: the size of a large one stands nowhere in the archive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One file to end up with: the parts of a repository, one after the other, unpacked if packed."""

    name: str
    repo: str
    parts: tuple[str, ...]

    @property
    def is_packed(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].endswith(".gz") and not self.name.endswith(".gz")

    @property
    def joined_name(self) -> str:
        return f"{self.name}.gz" if self.is_packed else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a finished file was made of, kept beside it."""

    repo: str
    parts: tuple[str, ...]
    commit: str | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The flags that every target shares."""

    folder: Path
    repo_type: str
    revision: str
    digests: dict[str, Digest]
    allow_unchecked: bool
    keep_archive: bool
    verify: bool


class Downloader:
    """Brings targets into a folder."""

    def __init__(self, hub: Hub, wishes: Wishes, *, console: Console, progress: Progress) -> None:
        self._hub = hub
        self._wishes = wishes
        self._console = console
        self._progress = progress

    def bring(self, target: Target) -> None:
        """Raises DownloadError; what was loaded by then is kept for the next run."""
        path = self._wishes.folder / target.name
        receipt = self._read_receipts().get(target.name)
        if receipt is not None and path.is_file():
            self._check_receipt(target, receipt, path)
            return
        remotes = [self._look_up(target, name) for name in target.parts]
        pieces = [Piece(label=r.name, size=r.size, digest=r.digest) for r in remotes]
        if path.is_file():
            self._adopt(target, pieces, path)
            self._write_receipt(target, remotes, pieces)
        else:
            self._check_room(target, remotes)
            self._make(target, remotes, pieces)
        self._console.print(f"{path}: {path.stat().st_size:,} bytes, checked")

    def _make(self, target: Target, remotes: Sequence[RemoteFile], pieces: list[Piece]) -> None:
        """The receipt comes before the finished file: whoever has both can trust the file."""
        path = self._wishes.folder / target.name
        joined = self._wishes.folder / target.joined_name
        partial = locate_partial(joined)
        if not target.is_packed or not joined.is_file() or find_fault(joined, pieces, show=self._show):
            join_parts(self._hub, remotes, partial=partial, show=self._show)
            if target.is_packed:
                partial.replace(joined)
                locate_notes(partial).unlink()
        if target.is_packed:
            pieces = [unpack(joined, locate_partial(path), show=self._show)]
        self._check_whole(target, locate_partial(path), pieces)
        self._write_receipt(target, remotes, pieces)
        locate_partial(path).replace(path)
        locate_notes(partial).unlink(missing_ok=True)
        if target.is_packed and not self._wishes.keep_archive:
            joined.unlink()

    def _look_up(self, target: Target, name: str) -> RemoteFile:
        wishes = self._wishes
        remote = self._hub.look_up(
            name, repo=target.repo, repo_type=wishes.repo_type, revision=wishes.revision
        )
        digest = wishes.digests.get(name, remote.digest)
        if digest is None and not wishes.allow_unchecked:
            raise DownloadError(
                f"{name}: {remote.url} names no hash (no ETag of 64 or 40 hexadecimal digits), expected one; "
                f"give it with --sha256 {name}=..., or go without by --allow_unchecked"
            )
        return replace(remote, digest=digest)

    def _check_room(self, target: Target, remotes: Sequence[RemoteFile]) -> None:
        folder = self._wishes.folder
        joined = folder / target.joined_name
        packed = sum(remote.size for remote in remotes)
        present = sum(p.stat().st_size for p in (joined, locate_partial(joined)) if p.is_file())
        unpacked = packed * UNPACKED_PER_PACKED if target.is_packed else 0.0
        needed = max(0, packed - present) + unpacked
        free = shutil.disk_usage(folder).free
        if needed > free:
            about = "about " if target.is_packed else ""
            raise DownloadError(
                f"{target.name}: {folder} has {decimal(free)} free, expected {about}{decimal(int(needed))}; "
                "make room or choose another --save_path"
            )

    def _adopt(self, target: Target, pieces: Sequence[Piece], path: Path) -> None:
        """A file that somebody else put there is as good as ours, if it is the right one."""
        if target.is_packed:
            raise DownloadError(
                f"{path} is there, but {RECEIPTS} says nothing of it; expected no such file, as there is no "
                "hash of the unpacked corpus: use it as it is, or move it away"
            )
        fault = find_fault(path, pieces, show=self._show)
        if fault is not None:
            raise DownloadError(f"{fault} by {target.repo}; delete it or choose another --save_path")
        self._check_whole(target, path, pieces)

    def _check_whole(self, target: Target, path: Path, pieces: Sequence[Piece]) -> None:
        """By the hash of the finished file, for whoever has one."""
        expected = self._wishes.digests.get(target.name)
        if expected is None or [piece.digest for piece in pieces] == [expected]:
            return
        whole = Piece(label=target.name, size=path.stat().st_size, digest=expected)
        fault = find_fault(path, [whole], show=self._show)
        if fault is not None:
            raise DownloadError(f"{fault} by --sha256; correct that, or delete the file and run again")

    def _check_receipt(self, target: Target, receipt: Receipt, path: Path) -> None:
        if (receipt.repo, receipt.parts) != (target.repo, target.parts):
            raise DownloadError(
                f"{path} was made of {receipt.repo} {list(receipt.parts)}, expected {target.repo} "
                f"{list(target.parts)}; delete it or choose another --save_path"
            )
        size, expected = path.stat().st_size, sum(piece.size for piece in receipt.pieces)
        fault = f"{path} has {size:,} bytes, expected {expected:,}" if size != expected else None
        if fault is None and self._wishes.verify:
            fault = find_fault(path, receipt.pieces, show=self._show)
        if fault is not None:
            raise DownloadError(f"{fault} as it was downloaded; delete it and run again")
        how = "verified" if self._wishes.verify else "not read again (--verify does)"
        self._console.print(f"{path}: there already, {how}")

    def _read_receipts(self) -> dict[str, Receipt]:
        path = self._wishes.folder / RECEIPTS
        try:
            return {str(name): read_receipt(facts) for name, facts in json.loads(path.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            fix = "delete it, and the files of which it told are checked anew"
            raise DownloadError(f"{path} is not what this script wrote ({error!r}); {fix}") from error

    def _write_receipt(self, target: Target, remotes: Sequence[RemoteFile], pieces: Sequence[Piece]) -> None:
        commit = remotes[0].commit
        receipt = Receipt(repo=target.repo, parts=target.parts, commit=commit, pieces=tuple(pieces))
        receipts = {**self._read_receipts(), target.name: receipt}
        facts = {name: asdict(receipt) for name, receipt in receipts.items()}
        write_json(self._wishes.folder / RECEIPTS, facts)

    @contextmanager
    def _show(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self._progress.add_task(label, total=total)

        def report(done: int) -> None:
            self._progress.update(task, completed=done)

        yield report
        self._progress.stop_task(task)


def read_receipt(facts: dict[str, Any]) -> Receipt:
    """From JSON. Raises what a wrong shape raises."""
    pieces = [
        Piece(label=piece["label"], size=piece["size"], digest=piece["digest"] and Digest(**piece["digest"]))
        for piece in facts["pieces"]
    ]
    return Receipt(
        repo=facts["repo"], parts=tuple(facts["parts"]), commit=facts["commit"], pieces=tuple(pieces)
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two runs must not write into the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DownloadError(
                f"another download is running in {folder}; wait for it, or stop it"
            ) from error
        yield


def read_checksums(texts: Sequence[str], files: Sequence[str]) -> dict[str, Digest]:
    """`NAME=HEX` from flags and `HEX  NAME` lines of files, as `sha256sum` writes them."""
    pairs = [tuple(text.split("=", 1)) if "=" in text else (text, "") for text in texts]
    for file in files:
        for number, line in enumerate(_read_lines(file), 1):
            if line.strip():
                value, _, name = line.strip().partition(" ")
                name = name.strip().removeprefix("*")
                pairs.append((Path(name).name or f"{file}:{number}", value))
    found: dict[str, Digest] = {}
    for name, value in pairs:
        digest = read_digest(value)
        if digest is None or digest.kind != "sha256":
            raise DownloadError(f"--sha256 {name}: {value!r} is no SHA-256; expected 64 hexadecimal digits")
        found[name] = digest
    return found


def _read_lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DownloadError(
            f"--checksums {file} cannot be read ({error}); name what sha256sum wrote"
        ) from error


def _parse_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(
            f"{text} is no time to wait, expected more than 0 seconds, up to a day"
        )
    return seconds


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
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
    endpoint = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    add("--endpoint", default=endpoint, help=f"hub or mirror (HF_ENDPOINT; now {endpoint})")
    add(
        "--sha256",
        action="append",
        default=[],
        metavar="NAME=HEX",
        help="expect this hash of a part or result",
    )
    add("--checksums", action="append", default=[], metavar="FILE", help="the same, as sha256sum writes it")
    add("--allow_unchecked", action="store_true", help="also take files for which nobody names a hash")
    add("--keep_archive", action="store_true", help="keep the packed corpus beside the unpacked one")
    add("--verify", action="store_true", help="read finished files again and compare their hash")
    add("--timeout", type=_parse_seconds, default=60.0, help="seconds without a byte before another attempt")
    add("--retries", type=int, default=8, help="attempts in a row without progress before giving up")
    return parser.parse_args(expand_home(arguments))


def choose_targets(settings: argparse.Namespace) -> list[Target]:
    """What was asked for, the corpus first: the smaller one shows sooner whether all is well."""
    corpus = Target(
        name=Path(settings.corpus_file.removesuffix(".gz")).name,
        repo=settings.corpus_repo,
        parts=(settings.corpus_file,),
    )
    index = Target(name=settings.index_name, repo=settings.index_repo, parts=tuple(settings.index_files))
    return {"corpus": [corpus], "index": [index], "all": [corpus, index]}[settings.what]


def download(
    settings: argparse.Namespace, *, token: str | None, console: Console, pause_s: float = 1.0
) -> None:
    """Bring everything that `settings` ask for. Raises DownloadError."""
    wishes = Wishes(
        folder=settings.save_path,
        repo_type=settings.repo_type,
        revision=settings.revision,
        digests=read_checksums(settings.sha256, settings.checksums),
        allow_unchecked=settings.allow_unchecked,
        keep_archive=settings.keep_archive,
        verify=settings.verify,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    hub = Hub(
        settings.endpoint,
        token=token,
        timeout_s=settings.timeout,
        max_failures=settings.retries,
        pause_s=pause_s,
    )
    try:
        with _alone_in(wishes.folder), Progress(*columns, console=console) as progress:
            downloader = Downloader(hub, wishes, console=console, progress=progress)
            for target in choose_targets(settings):
                downloader.bring(target)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        fix = "make room and run again to go on" if full else "choose another --save_path"
        raise DownloadError(f"{error.filename or wishes.folder}: {error.strerror}; {fix}") from error
    finally:
        hub.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all is there, 1 something is not and why, 130 interrupted."""
    settings = parse_arguments(arguments)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        download(settings, token=os.environ.get("HF_TOKEN"), console=console)
    except DownloadError as error:
        console.print(f"download: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

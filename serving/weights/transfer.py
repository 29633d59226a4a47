"""Brings files onto the volume: bounded, resumed, digested, and in their place only when whole.

Where they come from is a `RemoteFile`: how big it is, and how to read it from an offset.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from calotype.serving.wire.fetch_faults import Fault, FetchFailed, failed, volume_failed

PIECE_BYTES = 1024 * 1024
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further attempt; progress starts the row anew."""


class Interrupted(Exception):
    """The connection broke or the server hiccuped: what is there already stays."""


class RemoteFile(Protocol):
    """One file where the weights come from."""

    @property
    def name(self) -> str:
        """Path inside the folder that is fetched."""
        ...

    @property
    def size(self) -> int | None:
        """Bytes, where they are known before."""
        ...

    @property
    def version(self) -> str | None:
        """Names these very bytes; None where a later read may give others."""
        ...

    @property
    def sha256(self) -> str | None:
        """The digest that it must have, where that is known."""
        ...

    def read(
        self, offset: int, version: str | None
    ) -> contextlib.AbstractContextManager[tuple[int, str | None, Iterable[bytes]]]:
        """(start, version, pieces): ``start`` is ``offset``, or 0 where it is not the same file.

        Raises:
            FetchFailed: it is not there, or not for us.
            Interrupted: worth another attempt.
        """
        ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file that is whole and on the disk."""

    path: pathlib.Path
    size: int
    sha256: str


@dataclass(slots=True)
class Budget:
    """How much may be fetched altogether."""

    limit: int | None
    taken: int = 0

    def check(self, more: int, what: str) -> None:
        """Raises FetchFailed when ``more`` bytes do not fit."""
        if self.limit is not None and self.taken + more > self.limit:
            raise failed(
                Fault.TOO_LARGE,
                f"{what} is too large: the limit is {self.limit:,} bytes, and there are at least "
                f"{self.taken + more:,}.",
            )


def fetch_file(
    remote: RemoteFile,
    folder: pathlib.Path,
    budget: Budget,
    sleep: Callable[[float], None] = time.sleep,
) -> LocalFile:
    """Fetches one file into ``folder``; goes on where an earlier process was stopped.

    A folder is of one version of the remote files: what is whole there is not fetched again.

    Raises:
        FetchFailed: it cannot be had, is larger than the budget or not what was promised, or the
            volume is full.
    """
    target = folder / remote.name
    part = target.with_name(f".{target.name}.part")
    note = target.with_name(f".{target.name}.version")
    if remote.size is not None:
        budget.check(remote.size, remote.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and remote.size is not None and not _mismatch(remote, target):
            budget.taken += remote.size
            return LocalFile(target, remote.size, _digest(target))
        _check_room(remote, part, target.parent)
        resumed = part.exists()
        _fill(remote, part, note, budget, sleep)
        problem = _mismatch(remote, part)
        if problem and resumed:  # what was there before may be what is wrong
            part.unlink()
            _fill(remote, part, note, budget, sleep)
            problem = _mismatch(remote, part)
        if problem:
            part.unlink()
            raise failed(Fault.CHECKSUM_MISMATCH, problem)
        found = LocalFile(target, part.stat().st_size, _digest(part))
        os.replace(part, target)
        note.unlink(missing_ok=True)
    except OSError as error:
        raise volume_failed(error, str(target)) from error
    budget.taken += found.size
    return found


def _mismatch(remote: RemoteFile, part: pathlib.Path) -> str | None:
    size = part.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"{remote.name} has {size:,} bytes, but {remote.size:,} were announced."
    if remote.sha256 is None:
        return None
    digest = _digest(part)
    if digest == remote.sha256:
        return None
    return f"{remote.name} has the sha256 {digest}, but it should be {remote.sha256}."


def _fill(
    remote: RemoteFile,
    part: pathlib.Path,
    note: pathlib.Path,
    budget: Budget,
    sleep: Callable[[float], None],
) -> None:
    """Reads until the remote file ends, also over broken connections."""
    pauses = iter(PAUSES)
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(remote, part, note, budget)
            return
        except Interrupted as error:
            if (part.stat().st_size if part.exists() else 0) > before:
                pauses = iter(PAUSES)
            pause = next(pauses, None)
            if pause is None:
                raise failed(
                    Fault.UNREACHABLE, f"{remote.name} could not be fetched: {error}"
                ) from error
        sleep(pause)


def _append(remote: RemoteFile, part: pathlib.Path, note: pathlib.Path, budget: Budget) -> None:
    version, offset = None, 0
    if part.exists() and note.exists():
        with contextlib.suppress(ValueError):
            version = json.loads(note.read_text(encoding="utf-8"))
            offset = part.stat().st_size if version is not None else 0
    if remote.version is not None and version != remote.version:
        offset = 0
    if offset and offset == remote.size:
        return
    with remote.read(offset, version) as (start, now, pieces):
        note.write_text(json.dumps(now), encoding="utf-8")
        with part.open("r+b" if start and part.exists() else "wb") as file:
            file.truncate(start)
            file.seek(start)
            written = start
            for piece in pieces:
                written += len(piece)
                try:
                    budget.check(written, remote.name)
                except FetchFailed:
                    part.unlink()
                    raise
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())


def _check_room(remote: RemoteFile, part: pathlib.Path, folder: pathlib.Path) -> None:
    if remote.size is None:
        return
    here = part.stat().st_size if part.exists() else 0
    disk = os.statvfs(folder)
    room = disk.f_bavail * disk.f_frsize
    if remote.size - here > room:
        raise failed(
            Fault.VOLUME_FULL,
            f"{remote.name} needs {remote.size - here:,} bytes more, but the cache volume has "
            f"{room:,} left. Enlarge the volume, or remove what is not needed any more.",
        )


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pieces_of(path: pathlib.Path, offset: int) -> Iterator[bytes]:
    """The content of a local file from ``offset``."""
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(PIECE_BYTES):
            yield piece

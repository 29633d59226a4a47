"""Where the files of a data set lie. Nothing of a source is trusted: not names, sizes or links.

A source lists its files and reads one of them at a time, at most as many bytes as `Limits` allow.
Archives and prefixes of an object store are in `places`.
"""

from __future__ import annotations

import errno
import os
import pathlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from calotype.serving.core.errors import DatasetRefused, NotFound

MIB = 2**20
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
"""Endings of files that are taken for pictures; what they hold is looked at, not believed."""
NESTED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a source is read at all."""

    entries: int = 10_000
    """Files of any kind."""
    pictures: int = 1000
    file_bytes: int = 64 * MIB
    total_bytes: int = 4096 * MIB
    """Of all files, unpacked."""
    ratio: int = 200
    """An archive that unpacks to more than so many times its size is a bomb."""
    caption_bytes: int = 64 * 1024
    metadata_bytes: int = 16 * MIB
    pixels: int = 64_000_000
    """Of one picture."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source."""

    name: str
    """Its path inside the source, with '/'."""
    size: int
    refused: str | None = None
    """Why it is not read: a sentence. None = it can be."""
    version: str = ""
    """Changes when the file is written again, where the source tells."""


class Source(Protocol):
    """Files of a data set. Use it as a context manager."""

    name: str

    def entries(self) -> Sequence[Entry]:
        """Every file, by name. Raises DatasetRefused: the whole source cannot be used."""

    def read(self, name: str, most: int) -> bytes:
        """A file's bytes. Raises DatasetRefused: it has more than ``most``, or is gone."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def too_large(file: str, most: int) -> DatasetRefused:
    return DatasetRefused(
        f"{file} has more than {most:,} bytes; give a smaller file.", "file_too_large", file
    )


def within(limits: Limits, entries: Sequence[Entry], name: str) -> Sequence[Entry]:
    """The same entries, by name. Raises DatasetRefused: too many, or too large together."""
    if len(entries) > limits.entries:
        raise DatasetRefused(
            f"{name} has more than {limits.entries:,} files; split it.", "dataset_too_large", name
        )
    total = sum(entry.size for entry in entries)
    if total > limits.total_bytes:
        raise DatasetRefused(
            f"{name} holds {total:,} bytes; at most {limits.total_bytes:,} are read. Give smaller "
            "pictures, or fewer.",
            "dataset_too_large",
            name,
        )
    return sorted(entries, key=lambda entry: entry.name)


class FolderSource:
    """A folder and the folders in it. Links are refused, hidden files are left out."""

    def __init__(self, folder: pathlib.Path, limits: Limits | None = None) -> None:
        if not folder.is_dir():
            raise NotFound(f"There is no folder {folder}.", param=str(folder))
        self.name, self._folder, self._limits = str(folder), folder, limits or Limits()

    def entries(self) -> Sequence[Entry]:
        found: list[Entry] = []
        for root, folders, files in os.walk(self._folder):
            here = pathlib.Path(root)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in (*folders, *files):
                path = here / name
                inside = path.relative_to(self._folder).as_posix()
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode):
                    found.append(Entry(inside, 0, "is a link; put the file itself there"))
                elif stat.S_ISREG(status.st_mode) and not name.startswith("."):
                    found.append(Entry(inside, status.st_size, version=str(status.st_mtime_ns)))
            if len(found) > self._limits.entries:
                break
        return within(self._limits, found, self.name)

    def read(self, name: str, most: int) -> bytes:
        try:
            # A file that has become a link since it was listed is not followed.
            number = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(number, "rb") as file:
                data = file.read(most + 1)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise changed(name) from None
            raise DatasetRefused(
                f"{name} cannot be read: {error.strerror}.", "image_unreadable", name
            ) from None
        if len(data) > most:
            raise too_large(name, most)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


def changed(file: str) -> DatasetRefused:
    return DatasetRefused(
        f"{file} has changed since the data set was checked; leave it as it is until the training "
        "is over, and check it again.",
        "dataset_changed",
        file,
    )

"""Data sets in zip and tar archives, WebDataset shards included, of which nothing is trusted.

Nothing is unpacked to disk under a name of the archive. An archive whose entries lead out of it, or
that unpacks to far more than it is (a bomb), is refused whole; links, devices and archives inside
it are refused one by one. A compressed tar is unpacked once into a temporary file, within limits.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import pathlib
import posixpath
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Protocol, Self, cast

from calotype.serving.core.errors import DatasetRefused
from calotype.serving.training.dataset.sources import (
    MIB,
    NESTED,
    Entry,
    Limits,
    changed,
    too_large,
    within,
)

_PIECE = MIB
_ALWAYS_FINE = 64 * MIB
"""An archive that unpacks to less than this is no bomb, however small it is."""
_LARGEST_READ = 16 * MIB
"""Of one read by zipfile and tarfile themselves: of lists of entries, and of headers."""
_COMPRESSED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda file: cast(IO[bytes], gzip.open(file)),
    b"BZh": lambda file: cast(IO[bytes], bz2.open(file)),
    b"\xfd7zXZ": lambda file: cast(IO[bytes], lzma.open(file)),
}
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
_WRONG = (*_DAMAGED, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises of unknown methods, encryption and odd numbers comes with the damage."""


class _Archive(Protocol):
    """What zip and tar have in common."""

    def members(self) -> Iterator[tuple[str, int, str | None]]:
        """(name, size, why it is refused) of all that is no folder."""

    def open(self, name: str) -> IO[bytes]: ...

    def close(self) -> None: ...


class ArchiveSource:
    """A zip or tar file.

    Args:
        name: what errors and the report call it; None = as the file is called.
    """

    def __init__(
        self, path: pathlib.Path, limits: Limits | None = None, *, name: str | None = None
    ) -> None:
        self.name, self._path, self._limits = name or path.name, path, limits or Limits()
        self._stack = ExitStack()
        try:
            self._size = path.stat().st_size
            self._archive = self._opened()
            self._entries = self._listed()
        except DatasetRefused:
            self._stack.close()
            raise
        except _WRONG as error:
            self._stack.close()
            raise DatasetRefused(
                f"{self.name} is no zip or tar archive, or a damaged one ({error}).",
                "archive_unreadable",
                self.name,
            ) from None

    def entries(self) -> Sequence[Entry]:
        return self._entries

    def read(self, name: str, most: int) -> bytes:
        inside = self._inside.get(name)
        if inside is None:
            raise changed(name)
        data = bytearray()
        try:
            with self._archive.open(inside) as file:
                while len(data) <= most and (piece := file.read(_PIECE)):
                    data += piece
        except _WRONG as error:
            raise DatasetRefused(
                f"{name} is damaged in {self.name} ({error}).", "image_unreadable", name
            ) from None
        if len(data) > most:
            raise too_large(name, most)
        return bytes(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _opened(self) -> _Archive:
        file = self._bounded(self._path.open("rb"))
        if zipfile.is_zipfile(file):
            file.seek(0)
            archive: _Archive = _Zip(zipfile.ZipFile(file))
        else:
            archive = _Tar(tarfile.open(fileobj=self._plain(file), mode="r:"))
        self._stack.callback(archive.close)
        return archive

    def _bounded(self, file: IO[bytes]) -> IO[bytes]:
        # zipfile and tarfile read, seek and tell, and no more.
        return cast(IO[bytes], self._stack.enter_context(_Bounded(file, self.name)))

    def _plain(self, file: IO[bytes]) -> IO[bytes]:
        """The tar itself, out of what it is compressed with."""
        file.seek(0)
        head = file.read(6)
        file.seek(0)
        opened = next((how for magic, how in _COMPRESSED.items() if head.startswith(magic)), None)
        if opened is None:
            return file
        plain = self._stack.enter_context(tempfile.TemporaryFile())
        size = 0
        with opened(file) as unpacked:
            while piece := unpacked.read(_PIECE):
                size += len(piece)
                self._check_size(size)
                plain.write(piece)
        plain.seek(0)
        return self._bounded(plain)

    def _listed(self) -> Sequence[Entry]:
        found: dict[str, Entry] = {}
        total = 0
        for name, size, refused in self._archive.members():
            total += max(0, size)
            self._check_size(total)
            parts = name.replace("\\", "/").split("/")
            if ".." in parts or name.startswith(("/", "\\")) or ":" in parts[0] or "\0" in name:
                raise DatasetRefused(
                    f"{self.name}: {name[:200]!r} leads out of the archive; pack it again from "
                    "inside its folder.",
                    "archive_unsafe",
                    name[:200],
                )
            path = posixpath.normpath(name)
            if any(part.startswith((".", "__MACOSX")) for part in path.split("/")):
                continue
            if name.lower().endswith(NESTED):
                refused = "is an archive in an archive; put its pictures there instead"
            elif path in found:
                refused = "is in the archive twice; give each file a name of its own"
            found[path] = Entry(path, size, refused)
            if len(found) > self._limits.entries:
                break
        top = _top(list(found))
        self._inside = {name.removeprefix(top): name for name in found}
        return within(
            self._limits,
            [Entry(one.name.removeprefix(top), one.size, one.refused) for one in found.values()],
            self.name,
        )

    def _check_size(self, unpacked: int) -> None:
        limits = self._limits
        if unpacked > max(_ALWAYS_FINE, limits.ratio * self._size):
            raise DatasetRefused(
                f"{self.name} unpacks to more than {limits.ratio} times its size: that is no set "
                "of pictures.",
                "archive_unsafe",
                self.name,
            )
        if unpacked > limits.total_bytes:
            raise DatasetRefused(
                f"{self.name} unpacks to more than {limits.total_bytes:,} bytes; give smaller "
                "pictures, or fewer.",
                "dataset_too_large",
                self.name,
            )


class _Bounded:
    """A file that refuses single reads beyond `_LARGEST_READ`: lists and headers are small."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size if 0 <= size <= _LARGEST_READ else _LARGEST_READ + 1)
        if len(data) > _LARGEST_READ:
            raise DatasetRefused(
                f"{self._name}: its list of files is too long; pack fewer files.",
                "archive_unsafe",
                self._name,
            )
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def members(self) -> Iterator[tuple[str, int, str | None]]:
        for info in self._archive.infolist():
            refused = None
            if info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                refused = "is a link; put the file itself there"
            elif info.flag_bits & 1:
                refused = "is encrypted; pack it without a password"
            yield info.filename, info.file_size, refused

    def open(self, name: str) -> IO[bytes]:
        return self._archive.open(name)

    def close(self) -> None:
        self._archive.close()


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}

    def members(self) -> Iterator[tuple[str, int, str | None]]:
        for member in self._archive:
            if member.isdir():
                continue
            self._members[posixpath.normpath(member.name)] = member
            refused = None if member.isreg() else "is a link or device; put the file itself there"
            yield member.name, member.size, refused

    def open(self, name: str) -> IO[bytes]:
        file = self._archive.extractfile(self._members[name])
        if file is None:
            raise tarfile.TarError(f"{name} is no file")
        return file

    def close(self) -> None:
        self._archive.close()


def _top(names: list[str]) -> str:
    """``name/`` where all entries lie in one folder, else nothing."""
    tops = {name.partition("/")[0] for name in names if "/" in name}
    if len(tops) != 1 or any("/" not in name for name in names):
        return ""
    return f"{tops.pop()}/"

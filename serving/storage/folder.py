"""Blobs in a local folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Generator, Iterable, Iterator
from typing import BinaryIO

from calotype.serving.core.errors import NotFound, StorageFailed
from calotype.serving.core.protocols import PART_BYTES, OpenBlob
from calotype.serving.storage.keys import check_key


class FolderBlobStore:
    """A `BlobStore` in a local folder; several processes may use it at once.

    A blob appears under its name only when it is complete and on the disk: it is written beside
    its place, flushed and renamed. What a killed writer leaves is a ``.part`` file.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = pathlib.Path(root)

    def put(self, key: str, data: bytes) -> None:
        self.put_parts(key, (data,))

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    for data in parts:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
            _flush_folder(path.parent)
        except OSError as error:
            raise StorageFailed(
                f"The picture could not be stored in {self.root}: {error.strerror or error}.",
                retry_after=10,
            ) from error

    def get(self, key: str) -> bytes:
        with self._reading(key):
            return self._path(key).read_bytes()

    def open(self, key: str) -> OpenBlob:
        with self._reading(key):
            file = self._path(key).open("rb")
            parts = self._parts(key, file)
            next(parts)  # begun, so that closing it closes the file
            return OpenBlob(os.fstat(file.fileno()).st_size, parts)

    def _parts(self, key: str, file: BinaryIO) -> Generator[bytes]:
        """An empty part, then those of the file."""
        with file, self._reading(key):
            yield b""
            while part := file.read(PART_BYTES):
                yield part

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound(f"There is no stored file {key!r}.") from None
        except OSError as error:
            raise StorageFailed(
                f"The picture could not be read from {self.root}: {error.strerror or error}.",
                retry_after=10,
            ) from error

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StorageFailed(
                f"The picture could not be deleted from {self.root}: {error.strerror or error}."
            ) from error

    def entries(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        """(key, time of its last `put`) of every blob; what killed writers left is skipped."""
        try:
            for folder, _, names in os.walk(self.root / prefix):
                for name in names:
                    path = pathlib.Path(folder, name)
                    if name.startswith("."):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        modified = path.stat().st_mtime
                        yield path.relative_to(self.root).as_posix(), modified
        except OSError as error:
            raise StorageFailed(
                f"The folder {self.root} could not be listed: {error.strerror or error}."
            ) from error

    def _path(self, key: str) -> pathlib.Path:
        return self.root / check_key(key)


def _flush_folder(folder: pathlib.Path) -> None:
    """Makes the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

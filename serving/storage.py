"""Where pictures lie: bytes under a key, written whole or not at all.

The gateway reads, the generator writes; a key is chosen by the writer and looks like
``2026/11/asset_....png``. Another place than a local folder is another `BlobStore`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile

from calotype.serving.errors import InvalidRequest, NotFound, StorageFailed

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
MAX_KEY_CHARS = 512


def check_key(key: str) -> str:
    """Returns ``key`` when it names something inside the store.

    Raises:
        InvalidRequest: the key is empty, absolute, climbs out (``..``) or has odd characters.
    """
    if len(key) > MAX_KEY_CHARS or _KEY.fullmatch(key) is None:
        raise InvalidRequest(
            f"A blob key has letters, digits, '.', '_', '-' and '/' between its parts; "
            f"got {key[:80]!r}."
        )
    return key


class FolderBlobStore:
    """A `BlobStore` in a local folder; several processes may use it at once.

    A blob appears under its name only when it is complete and on the disk: it is written beside
    its place, flushed and renamed. What a killed writer leaves is a ``.part`` file.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = pathlib.Path(root)

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
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
        try:
            return self._path(key).read_bytes()
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

    def _path(self, key: str) -> pathlib.Path:
        return self.root / check_key(key)


def _flush_folder(folder: pathlib.Path) -> None:
    """Makes the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

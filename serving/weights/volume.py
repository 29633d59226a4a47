"""Files that are on this machine already: on a mounted claim, in a folder, in the package."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from calotype.serving.weights.transfer import pieces_of
from calotype.serving.wire.fetch_faults import Fault, failed


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """A `transfer.RemoteFile` on a disk that is mounted here."""

    path: pathlib.Path
    name: str
    size: int
    version: str
    sha256: str | None = None

    @contextlib.contextmanager
    def read(
        self, offset: int, version: str | None
    ) -> Iterator[tuple[int, str | None, Iterable[bytes]]]:
        yield offset, self.version, pieces_of(self.path, offset)


def find_files(place: pathlib.Path, root: pathlib.Path | None) -> list[VolumeFile]:
    """The file ``place``, or every file under it.

    Args:
        root: what the place must lie in, links followed; None = anywhere.

    Raises:
        FetchFailed: nothing is there, or it leads out of the volume.
    """
    try:
        real = place.resolve(strict=True)
    except OSError as error:
        raise failed(Fault.NOT_FOUND, f"There is no {place} ({error.strerror or error}).") from None
    paths = [real] if real.is_file() else sorted(p for p in real.rglob("*") if p.is_file())
    found = [_file(path, real if real.is_dir() else real.parent, root) for path in paths]
    if not found:
        raise failed(Fault.NOT_FOUND, f"{place} holds no files.")
    return found


def _file(path: pathlib.Path, base: pathlib.Path, root: pathlib.Path | None) -> VolumeFile:
    real = path.resolve()
    if root is not None and not real.is_relative_to(root.resolve()):
        raise failed(
            Fault.SOURCE_INVALID, f"{path} is a link that leads out of the volume; copy the file."
        )
    stat = real.stat()
    version = f"{stat.st_mtime_ns}-{stat.st_size}-{stat.st_ino}"
    return VolumeFile(real, str(path.relative_to(base)), stat.st_size, version)

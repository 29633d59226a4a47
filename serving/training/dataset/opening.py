"""Opens whatever a data set lies in, by what it is."""

from __future__ import annotations

import pathlib

from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.training.dataset.places.archives import ArchiveSource
from calotype.serving.training.dataset.places.bucket import BucketSource
from calotype.serving.training.dataset.sources import FolderSource, Limits, Source

_STORE = "s3://"


def open_source(place: str | pathlib.Path, limits: Limits | None = None) -> Source:
    """A folder, a zip or tar file, or a prefix such as ``s3://bucket/pictures/``.

    Close it, or use it as a context manager.

    Raises:
        NotFound: there is nothing.
        DatasetRefused: it is an archive that cannot be used.
        InvalidRequest: it is nothing that a data set lies in.
    """
    if isinstance(place, str) and "://" in place:
        if not place.startswith(_STORE):
            raise InvalidRequest(
                f"{place[:120]} is no address of a data set; give a folder, a zip or tar file, or "
                "s3://BUCKET/PREFIX/.",
                param="dataset",
            )
        return BucketSource.of(place, limits)
    path = pathlib.Path(place)
    if not path.exists():
        raise NotFound(f"There is no data set {path}.", param=str(path))
    return FolderSource(path, limits) if path.is_dir() else ArchiveSource(path, limits)

"""Opens whatever a data set lies in, by what it is."""

from __future__ import annotations

import pathlib

from calotype.serving.core.errors import NotFound
from calotype.serving.training.dataset.sources import FolderSource, Limits, Source


def open_source(place: str | pathlib.Path, limits: Limits | None = None) -> Source:
    """A folder. Close it, or use it as a context manager.

    Raises:
        NotFound: there is nothing.
        DatasetRefused: it is nothing that a data set lies in.
    """
    path = pathlib.Path(place)
    if not path.exists():
        raise NotFound(f"There is no data set {path}.", param=str(path))
    return FolderSource(path, limits)

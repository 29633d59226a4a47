"""Lists of known pictures that are refused wherever they turn up: given, drawn or turned.

A list is a text file with a line for each picture: its PDQ in 64 hexadecimal digits, the category
it is refused for, and a note of one's own. ``#`` begins a comment. A list is read again when it
changes, so that a takedown needs no restart; one that cannot be read refuses every picture.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calotype.moderation import pdq
from calotype.moderation.decision import Finding
from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.pdq import Pixels, Words
from calotype.moderation.policy import Category, Verdict

CLASSIFIER = "pdq"


@dataclass(frozen=True, slots=True)
class _List:
    """One file as it was read."""

    name: str
    stamp: tuple[int, int, int]
    """Inode, size and time of change of the file."""
    hashes: Words
    """[n, 4]"""
    categories: tuple[Category, ...]
    lines: tuple[int, ...]


class KnownPictures:
    """All lists of a policy.

    Args:
        paths: files; none means that nothing is known.
    """

    def __init__(self, paths: Sequence[str | pathlib.Path]) -> None:
        self._paths = [pathlib.Path(path) for path in paths]
        self._read: dict[pathlib.Path, _List] = {}
        self._lock = threading.Lock()

    def findings(self, pixels: Pixels) -> list[Finding]:
        """The best match of each list, in any of the eight ways of turning the picture.

        Raises:
            ClassifierUnavailable: a list is missing or wrong; names the file and the line.
        """
        lists = [self._current(path) for path in self._paths]
        if not any(len(known.hashes) for known in lists):
            return []
        turned, quality = pdq.pdq_turned(pixels)
        if quality < pdq.USABLE_QUALITY:
            return []
        found = []
        for known in lists:
            if not len(known.hashes):
                continue
            away = np.min([pdq.distances(known.hashes, one) for one in turned], axis=0)
            nearest = int(away.argmin())
            if away[nearest] <= pdq.SAME:
                found.append(
                    Finding(
                        known.categories[nearest],
                        Verdict.BLOCK,
                        1.0 - int(away[nearest]) / 256,
                        1.0 - pdq.SAME / 256,
                        f"pictures.{known.name}.{known.lines[nearest]}",
                        CLASSIFIER,
                        "whole",
                    )
                )
        return found

    def _current(self, path: pathlib.Path) -> _List:
        try:
            status = path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            with self._lock:
                known = self._read.get(path)
            if known is None or known.stamp != stamp:
                known = _parsed(path, stamp, path.read_text(encoding="utf-8"))
                with self._lock:
                    self._read[path] = known
        except OSError as error:
            raise ClassifierUnavailable(
                f"List of pictures {path} cannot be read: {error.strerror}."
            ) from None
        except UnicodeDecodeError as error:
            raise ClassifierUnavailable(f"List of pictures {path} is no text: {error}.") from None
        return known


def _parsed(path: pathlib.Path, stamp: tuple[int, int, int], text: str) -> _List:
    hashes, categories, lines = [], [], []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].split(maxsplit=2)
        if not entry:
            continue
        try:
            if len(entry) < 2:
                raise ValueError("write a hash, a space and a category")
            hashes.append(pdq.words(entry[0]))
            categories.append(Category(entry[1]))
        except ValueError as error:
            raise ClassifierUnavailable(
                f"List of pictures {path}, line {number}: {error}."
            ) from None
        lines.append(number)
    stacked = np.stack(hashes) if hashes else np.empty((0, 4), dtype=np.uint64)
    return _List(path.stem, stamp, stacked, tuple(categories), tuple(lines))

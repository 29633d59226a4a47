"""Lists of known images that are refused as input or output, in any orientation.

A list is a text file with a line for each image: its PDQ in 64 hexadecimal digits, the category
it is refused for, and a note of one's own. ``#`` begins a comment. A list is read again when it
changes, so that a takedown needs no restart; one that cannot be read refuses every image.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calotype.moderation.decision import Finding
from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.images import pdq
from calotype.moderation.images.pdq import Pixels, Words
from calotype.moderation.policy.categories import Category, Verdict

CLASSIFIER = "pdq"


@dataclass(frozen=True, slots=True)
class KnownList:
    """Images that are refused, from one place."""

    name: str
    hashes: Words
    """[n, 4]"""
    categories: tuple[Category, ...]
    """[n] what each is refused for."""
    labels: tuple[str, ...]
    """[n] what a finding calls each: a line's number, a takedown's id."""
    exact: Mapping[str, tuple[Category, str]] = field(default_factory=dict)
    """Fingerprint of the very pixels -> category and label; of flat images too."""


KnownSource = Callable[[], KnownList]
"""The list as it is now. Raises ClassifierUnavailable."""


class KnownImages:
    """All lists of a policy, and those that hold under every policy.

    Args:
        paths: files; none means that nothing is known.
        sources: further lists, asked at every image.
        fingerprint: of the very pixels, as `KnownList.exact` has it; None = nothing is compared so.
    """

    def __init__(
        self,
        paths: Sequence[str | pathlib.Path],
        sources: Sequence[KnownSource] = (),
        fingerprint: Callable[[Pixels], str] | None = None,
    ) -> None:
        self._paths = [pathlib.Path(path) for path in paths]
        self._sources, self._fingerprint = tuple(sources), fingerprint
        self._read: dict[pathlib.Path, tuple[tuple[int, int, int], KnownList]] = {}
        self._lock = threading.Lock()

    def findings(self, pixels: Pixels) -> list[Finding]:
        """The best match of each list, in any of the eight ways of turning the image.

        Raises:
            ClassifierUnavailable: a list is missing or wrong; names the file and the line.
        """
        lists = [self._current(path) for path in self._paths]
        lists += [source() for source in self._sources]
        found = self._exact(lists, pixels)
        if not any(len(known.hashes) for known in lists):
            return found
        turned, quality = pdq.pdq_turned(pixels)
        if quality < pdq.USABLE_QUALITY:
            return found
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
                        f"pictures.{known.name}.{known.labels[nearest]}",
                        CLASSIFIER,
                        "whole",
                    )
                )
        return found

    def _exact(self, lists: Sequence[KnownList], pixels: Pixels) -> list[Finding]:
        if self._fingerprint is None or not any(known.exact for known in lists):
            return []
        same = self._fingerprint(pixels)
        return [
            Finding(
                known.exact[same][0],
                Verdict.BLOCK,
                1.0,
                1.0,
                f"pictures.{known.name}.{known.exact[same][1]}",
                "fingerprint",
                "whole",
            )
            for known in lists
            if same in known.exact
        ]

    def _current(self, path: pathlib.Path) -> KnownList:
        try:
            status = path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            with self._lock:
                known = self._read.get(path)
            if known is None or known[0] != stamp:
                # Inode, size and time of change as they were before it was read.
                known = stamp, _parsed(path, path.read_text(encoding="utf-8"))
                with self._lock:
                    self._read[path] = known
        except OSError as error:
            raise ClassifierUnavailable(
                f"List of pictures {path} cannot be read: {error.strerror}."
            ) from None
        except UnicodeDecodeError as error:
            raise ClassifierUnavailable(f"List of pictures {path} is no text: {error}.") from None
        return known[1]


def _parsed(path: pathlib.Path, text: str) -> KnownList:
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
        lines.append(str(number))
    stacked = np.stack(hashes) if hashes else np.empty((0, 4), dtype=np.uint64)
    return KnownList(path.stem, stacked, tuple(categories), tuple(lines))

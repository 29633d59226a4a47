"""Scripted classifiers for tests: refusals and failures without unsafe content."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from calotype.moderation.classifiers import Pixels, Scores


class FixedTextClassifier:
    """Gives every text the same scores, or only the texts that contain a word."""

    def __init__(
        self, scores: Mapping[str, float], *, containing: str = "", name: str = "fixed-text"
    ) -> None:
        self.name = name
        self.texts: list[str] = []
        self._scores = dict(scores)
        self._containing = containing

    def score(self, texts: Sequence[str]) -> list[Scores]:
        self.texts.extend(texts)
        return [
            self._scores if self._containing in text else dict.fromkeys(self._scores, 0.0)
            for text in texts
        ]


class FixedImageClassifier:
    """Gives every image the same scores, or only those mostly of one colour.

    Args:
        scores: per category.
        colour: the marked colour, red, green, blue.
        cover: the part of an image that must have the colour.
    """

    def __init__(
        self,
        scores: Mapping[str, float],
        *,
        colour: tuple[int, int, int] | None = None,
        cover: float = 0.2,
        name: str = "fixed-image",
    ) -> None:
        self.name = name
        self._scores = dict(scores)
        self._colour = colour
        self._cover = cover

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        return [
            self._scores if self._marked(image) else dict.fromkeys(self._scores, 0.0)
            for image in images
        ]

    def _marked(self, image: Pixels) -> bool:
        if self._colour is None:
            return True
        return share_of(image, self._colour) >= self._cover


def share_of(image: Pixels, colour: tuple[int, int, int]) -> float:
    """The part of an image's pixels that have a colour, red, green, blue."""
    # Band by band: reducing an innermost axis of three takes ten times as long.
    red, green, blue = (image[:, :, band] == value for band, value in enumerate(colour))
    return float((red & green & blue).mean())


class HangingClassifier:
    """Does not answer until `release` is called."""

    def __init__(self, name: str = "hanging") -> None:
        self.name = name
        self._released = threading.Event()

    def release(self) -> None:
        self._released.set()

    def score(self, inputs: Sequence[Any]) -> list[Scores]:
        self._released.wait()
        return [{} for _ in inputs]


class RaisingClassifier:
    """Raises, the first ``times`` times or always."""

    def __init__(
        self, error: Exception | None = None, *, times: int | None = None, name: str = "raising"
    ) -> None:
        self.name = name
        self._error = error or RuntimeError("out of order")
        self._left = times

    def score(self, inputs: Sequence[Any]) -> list[Scores]:
        if self._left is None or self._left > 0:
            self._left = None if self._left is None else self._left - 1
            raise self._error
        return [{} for _ in inputs]


class NaNClassifier:
    """Answers a number that is none."""

    def __init__(self, value: float = float("nan"), name: str = "nan") -> None:
        self.name = name
        self._value = value

    def score(self, inputs: Sequence[Any]) -> list[Scores]:
        return [{"sexual": self._value} for _ in inputs]

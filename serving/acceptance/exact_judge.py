"""The judge for the embedded model: the exact classifier of its scenes.

The subject's outline is learnt from the training pictures; prompts are read word by word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from calotype.serving.acceptance.judges import Judge
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.training.captions import POSITION_WORDS, SHAPE_WORDS
from calotype.serving.training.scene_classifier import Outline, Seen, learn_outline, look
from calotype.serving.training.scenes import COLOR_NAMES, SHAPES

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

SUBJECT = "the subject"
_DEBRIS = 40
"""Pixels of a 128-pixel canvas that may be neither ground nor thing."""
_COLOR = "|".join(COLOR_NAMES)
_GROUND = re.compile(rf"\b({_COLOR}) background|\bon(?: an?)? ({_COLOR})\b")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a prompt says of its one thing; None = it does not say."""

    shape: str | None
    color: str | None
    background: str | None
    position: str | None


def read_prompt(prompt: str) -> Asked:
    """The attributes that a caption of one flat shape names."""
    text = prompt.lower()
    ground = _GROUND.search(text)
    background = next((name for name in ground.groups() if name), None) if ground else None
    rest = text[: ground.start()] + text[ground.end() :] if ground else text
    color = re.search(rf"\b({_COLOR})\b", rest)
    found = [(len(words), name) for name, known in POSITION_WORDS.items() for words in known
             if words in text]  # fmt: skip
    shape = next(
        (s for s in SHAPES for word in SHAPE_WORDS.get(s, (s,)) if re.search(rf"\b{word}\b", text)),
        None,
    )
    return Asked(shape, color[1] if color else None, background, max(found)[1] if found else None)


@dataclass(frozen=True)
class ExactJudge(Judge):
    """Reads flat shapes on flat grounds.

    Args:
        training: pictures of the subject; without any, `subject` cannot be asked.
    """

    training: tuple[Pixels, ...] = ()
    name: str = "exact"

    @cached_property
    def _outlines(self) -> tuple[Outline, ...]:
        if not self.training:
            return ()
        try:
            return (learn_outline(SUBJECT, self.training),)
        except ValueError as error:
            raise InvalidRequest(
                f"The training pictures cannot be judged for the model shapes: {error}.",
                param="dataset",
            ) from None

    def subject(self, pictures: Sequence[Pixels]) -> list[float]:
        return [self._shows_subject(picture) for picture in pictures]

    def adherence(self, prompts: Sequence[str], pictures: Sequence[Pixels]) -> list[float]:
        return [
            self._obeys(read_prompt(prompt), picture)
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]

    def _shows_subject(self, picture: Pixels) -> float:
        _, seen, _ = look(picture, self._outlines)
        return float(bool(seen) and seen[0].shape == SUBJECT)

    def _obeys(self, asked: Asked, picture: Pixels) -> float:
        background, seen, debris = look(picture, self._outlines)
        first = seen[0] if seen else Seen(None, None, None, None, 0, (0.0, 0.0))
        right = [len(seen) == 1 and debris < _DEBRIS]
        for wanted, found in (
            (asked.shape, first.shape),
            (asked.color, first.color),
            (asked.background, background),
            (asked.position, first.position),
        ):
            if wanted is not None:
                right.append(wanted == found)
        return sum(right) / len(right)

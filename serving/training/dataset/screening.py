"""The safety stage looks at every picture and every caption before anything is learnt from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from calotype.serving.core.errors import DatasetRefused, ModerationUnavailable
from calotype.serving.training.dataset.images.pictures import Pixels, pixels_of

_CHECKED_PIXELS = 4096 * 4096
"""Larger pictures are checked at this size, which is more than is learnt of any."""


class Verdict(Protocol):
    """A decision, of `calotype.moderation.decision` or as a service carries it."""

    @property
    def blocked(self) -> bool: ...

    @property
    def unavailable(self) -> bool: ...

    @property
    def reason(self) -> str | None: ...

    @property
    def categories(self) -> Sequence[str]: ...


class Screen(Protocol):
    """The safety stage: `calotype.moderation.moderator.Moderator`, or that of a service."""

    def check_prompt(self, text: str) -> Verdict: ...

    def check_image(self, pixels: Pixels, *, prompt: str = "") -> Verdict: ...


class Screening:
    """Asks the safety stage; each caption once."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._captions = screen, dict[str, Verdict]()

    def check(self, file: str, image: Image.Image, caption: str) -> None:
        """Raises DatasetRefused ``content_refused``; ModerationUnavailable: nothing is known."""
        if caption not in self._captions:
            self._captions[caption] = self._screen.check_prompt(caption)
        _passed(self._captions[caption], file, "text", "Its caption")
        _passed(
            self._screen.check_image(pixels_of(_reduced(image)), prompt=caption), file, None, "It"
        )


def _reduced(image: Image.Image) -> Image.Image:
    pixels = image.width * image.height
    if pixels <= _CHECKED_PIXELS:
        return image
    scale = (_CHECKED_PIXELS / pixels) ** 0.5
    size = int(image.width * scale), int(image.height * scale)
    return image.resize(size, Image.Resampling.BOX)


def _passed(decision: Verdict, file: str, field: str | None, what: str) -> None:
    if decision.unavailable:
        raise ModerationUnavailable(
            f"{file} could not be checked by the safety stage: {decision.reason} No picture is "
            "learnt from unchecked.",
            param=file,
        )
    if not decision.blocked:
        return
    categories = [str(category) for category in decision.categories]
    raise DatasetRefused(
        f"{file}: {what} was refused by the safety stage ({', '.join(categories)}); take the "
        "picture out of the set.",
        "content_refused",
        file,
        details={"field": field, "categories": categories},
    )

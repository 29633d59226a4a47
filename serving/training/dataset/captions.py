"""The caption that a picture is learnt with: provided, automatic, or the trigger word alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from calotype.serving.training.dataset.images.pictures import Pixels

PLACEHOLDER = "[trigger]"
"""In a caption it stands for the trigger word, as ai-toolkit's and Replicate's trainers read it."""
Captioner = Callable[[Pixels], str]
"""Says in a sentence what a picture, uint8 [height, width, 3], shows."""


class CaptionSource(StrEnum):
    PROVIDED = "provided"
    AUTOMATIC = "automatic"
    TRIGGER = "trigger"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class Wording:
    """What is added to every caption."""

    trigger: str | None = None
    class_word: str | None = None
    """What the trigger is one of, for captions of the trigger alone: "zorbl toy"."""
    prefix: str = ""
    suffix: str = ""
    fallback: str | None = None
    """Caption of pictures that have none."""

    def caption(
        self, provided: str | None, automatic: Callable[[], str | None]
    ) -> tuple[str, CaptionSource] | None:
        """The final caption and where it is from; None = there is nothing to say."""
        if provided:
            return self._worded(provided), CaptionSource.PROVIDED
        if written := automatic():
            return self._worded(written), CaptionSource.AUTOMATIC
        if self.fallback:
            return self._worded(self.fallback), CaptionSource.FALLBACK
        if self.trigger:
            alone = " ".join(filter(None, (self.trigger, self.class_word)))
            return self._worded(alone), CaptionSource.TRIGGER
        return None

    def _worded(self, text: str) -> str:
        if self.trigger:
            text = text.replace(PLACEHOLDER, self.trigger)
            if self.trigger.lower() not in text.lower():
                text = f"{self.trigger}, {text}"
        else:
            text = " ".join(text.replace(PLACEHOLDER, "").split())
        return " ".join(f"{self.prefix} {text} {self.suffix}".split())

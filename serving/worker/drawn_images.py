"""What happens to a drawn image: made as large as it was asked for, and shown or not.

Used wherever something is drawn: in replicas, on the command line and by the tests' painter.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from calotype.serving.core.decision import Decision
from calotype.serving.core.request import GenerationRequest
from calotype.serving.engine.model.input_images import restore_outside
from calotype.serving.images.encode import enlarge

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


class Fate(enum.Enum):
    SHOW = enum.auto()
    BLUR = enum.auto()
    """It is shown blurred."""
    HOLD = enum.auto()
    """It is stored sealed, and waits for a reviewer."""
    BLOCK = enum.auto()
    """Nothing of it is stored."""


def fate_of(decision: Decision, *, held_by_prompt: bool, sealable: bool) -> Fate:
    """Args:
    held_by_prompt: the prompt's decision makes every image wait for a reviewer.
    sealable: images can be held; otherwise one that must be is blocked.
    """
    waits = decision.verdict == "REVIEW" or (held_by_prompt and decision.verdict != "BLOCK")
    if waits and sealable:
        return Fate.HOLD
    if decision.verdict == "BLUR":
        return Fate.BLUR
    return Fate.BLOCK if decision.blocked else Fate.SHOW


def at_requested_size(
    request: GenerationRequest, drawn: Sequence[Pixels], files: Mapping[str, bytes]
) -> list[Pixels]:
    """Enlarges what the denoiser drew smaller than it was asked for.

    Args:
        drawn: uint8 [height, width, 3] each.
        files: the images that the request names; what a mask protects is taken from them.
    """
    if request.rendered_size == request.size:
        return list(drawn)
    return [restore_outside(request, files, enlarge(image, request.size)) for image in drawn]

"""What a request draws after, besides its prompt: control maps, and how references are looked at.

Plain values of the request, without torch.
"""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import asdict, dataclass
from typing import Literal

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject

MAX_CONTROLS = 4
"""Control maps of one request."""
MAX_CONTROL_SCALE = 2.0

PREPROCESSOR_ENTRY_POINTS = "calotype.preprocessors"
"""Entry-point group by which an installed package adds preprocessors."""
GIVEN = "none"
"""The type of a map that is given as it is; no preprocessor runs."""
MAP_PREFIX = "map:"
"""How the names of maps begin that were made for a request."""
PREPROCESSORS = (GIVEN, "canny")
"""Those of this package."""
MAP_KINDS = (*PREPROCESSORS, "depth", "pose", "segmentation")
"""Types that every installation knows by name; the last three need an installed package."""

Role = Literal["subject", "style", "composition"]
ROLES: tuple[Role, ...] = ("subject", "style", "composition")


def map_types() -> tuple[str, ...]:
    """Every type of map that can be made here, those of installed packages included."""
    added = importlib.metadata.entry_points(group=PREPROCESSOR_ENTRY_POINTS).names
    return (*PREPROCESSORS, *sorted(set(added) - set(PREPROCESSORS)))


@dataclass(frozen=True, slots=True)
class ControlRef:
    """A control adapter by name, and the map that it follows.

    Attributes:
        image: name of the map, or of the picture that a map is made of.
        type: how the map is made of ``image``; `GIVEN` takes it as it is.
        scale: how strongly it is followed, 0 to 2.
        start: share of the steps after which it begins.
        end: share of the steps after which it ends.
    """

    name: str
    image: str
    type: str = GIVEN
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def to_payload(self) -> JsonObject:
        content = asdict(self)
        return {"id": content.pop("name"), **content}

    @classmethod
    def from_payload(cls, payload: JsonObject) -> ControlRef:
        given = {name: payload[name] for name in _CONTROL_FIELDS if name in payload}
        return cls(payload["id"], **given)


_CONTROL_FIELDS = ("image", "type", "scale", "start", "end")


@dataclass(frozen=True, slots=True)
class ReferenceUse:
    """How one reference image is looked at.

    Attributes:
        role: what of it counts; words behind the prompt say so to the model.
        strength: weight of its tokens in attention, above 0; 1 is as the model was trained.
        start: share of the steps after which it is looked at.
        end: share of the steps after which it is no longer looked at, and costs nothing.
        max_pixels: it is made no larger than this; None is the model's own limit.
    """

    role: Role | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    max_pixels: int | None = None

    def to_payload(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: JsonObject) -> ReferenceUse:
        return cls(**{name: payload[name] for name in _REFERENCE_FIELDS if name in payload})


USE_OF_ROLE: dict[Role, ReferenceUse] = {
    "subject": ReferenceUse("subject"),
    "style": ReferenceUse("style", start=0.3, max_pixels=512 * 512),
    "composition": ReferenceUse("composition", end=0.5, max_pixels=512 * 512),
}
"""What a role means where a request says no more: where things stand is settled in the first steps,
and how their surfaces look in the later ones. A quarter of a megapixel is enough for both."""

_REFERENCE_FIELDS = ("role", "strength", "start", "end", "max_pixels")


def check_controls(controls: tuple[ControlRef, ...]) -> None:
    """Raises InvalidRequest where there are too many, or a number is out of its range."""
    if len(controls) > MAX_CONTROLS:
        raise InvalidRequest(
            f"controlnets has {len(controls)} entries; at most {MAX_CONTROLS} are possible.",
            param="controlnets",
        )
    for place, control in enumerate(controls):
        where = f"controlnets[{place}]"
        if not (math.isfinite(control.scale) and 0 <= control.scale <= MAX_CONTROL_SCALE):
            raise InvalidRequest(
                f"{where}.scale is {control.scale:g}; it must be 0 to {MAX_CONTROL_SCALE:g}.",
                param=f"{where}.scale",
            )
        _check_window(control.start, control.end, where)


def check_references(uses: tuple[ReferenceUse, ...]) -> None:
    """Raises InvalidRequest where a number is out of its range."""
    for place, use in enumerate(uses):
        where = f"reference_images[{place}]"
        if not (math.isfinite(use.strength) and 0 < use.strength <= 4):
            raise InvalidRequest(
                f"{where}.strength is {use.strength:g}; it must be above 0 and at most 4, and 1 is "
                "the model's own. Leave the picture out for 0.",
                param=f"{where}.strength",
            )
        _check_window(use.start, use.end, where)


def _check_window(start: float, end: float, where: str) -> None:
    # Written so that NaN fails, too.
    if not 0 <= start <= end <= 1:
        raise InvalidRequest(
            f"{where} wants 0 <= start <= end <= 1, shares of the steps; got start {start:g} and "
            f"end {end:g}.",
            param=f"{where}.start",
        )


def acts(start: float, end: float, step: int, steps: int) -> bool:
    """Whether a window of shares holds a step, counted from 0.

    As ``control_guidance_start`` and ``control_guidance_end`` of diffusers' pipelines: the whole
    step must lie inside.
    """
    return step / steps >= start and (step + 1) / steps <= end

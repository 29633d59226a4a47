"""What a request may ask of a model, and what it gets that does not say."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from calotype.serving.config.base import VALIDATIONS, Matches, Rule, Spec
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import MAX_REFERENCES, SAMPLER_NAMES, ImageSize

PATCH = 16
"""Width and height of a picture are multiples of this: 8x by the VAE, 2x by the patching."""
MOST_PIXELS = 67_108_864
"""8192 x 8192: what a manifest may allow at most."""

_SIZE_MESSAGE = (
    "a size is WIDTHxHEIGHT in pixels, both multiples of 16 and at most 8192, for example "
    "'1024x1024'"
)


def _checked_size(text: str) -> str:
    try:
        size = ImageSize.parse(text)
    except InvalidRequest:
        size = None
    sides = (size.width, size.height) if size is not None else (0, 0)
    if str(size) != text or any(s % PATCH or not PATCH <= s <= 8192 for s in sides):
        raise ValueError(f"{_SIZE_MESSAGE}; got {text[:40]!r}")
    return text


Size = Annotated[
    str,
    AfterValidator(_checked_size),
    WithJsonSchema(
        {
            "type": "string",
            "minLength": 5,
            "maxLength": 9,
            VALIDATIONS: [
                {
                    "rule": "self.matches('^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$') && "
                    "self.split('x').all(side, int(side) % 16 == 0 && int(side) <= 8192)",
                    "message": _SIZE_MESSAGE,
                }
            ],
        }
    ),
]


SamplerName = Annotated[
    str,
    Field(min_length=1, max_length=64),
    Matches(
        "|".join(SAMPLER_NAMES) + r"|[A-Za-z0-9_-]+\.[A-Za-z0-9._-]+",
        f"a sampler is one of {', '.join(SAMPLER_NAMES)}, or one that a package adds, which has a "
        "dot in its name",
    ),
]


class Defaults(Spec):
    """What a request gets that does not say."""

    steps: int = Field(28, ge=1, le=1000, description="Denoise steps.")
    guidance_scale: float = Field(4.0, ge=0, le=100, description="Distilled guidance; 0 = none.")
    sampler: SamplerName = Field(
        "flow-euler",
        description="How noise is taken away step by step: one of the package, or one that an "
        "installed package adds under a name with a dot, such as acme.sde.",
    )
    size: Size = Field("1024x1024", description="WIDTHxHEIGHT in pixels, both multiples of 16.")


class Preset(Spec):
    """What `quality` stands for."""

    steps: int = Field(ge=1, le=1000, description="Denoise steps.")


class Limits(Spec):
    """What is refused with 400 before it costs anything."""

    rules = (
        Rule(
            lambda s: s.min_side * s.min_side <= s.max_pixels,
            "self.minSide * self.minSide <= self.maxPixels",
            "maxPixels is smaller than minSide x minSide, so that no size would be allowed: lower "
            "minSide or raise maxPixels",
            ".maxPixels",
        ),
    )

    min_side: int = Field(64, ge=PATCH, le=8192, description="Smallest width or height, in pixels.")
    max_pixels: int = Field(
        4_194_304, ge=4096, le=MOST_PIXELS, description="Largest width x height, in pixels."
    )
    max_steps: int = Field(50, ge=1, le=1000, description="Most denoise steps of a request.")
    max_images: int = Field(10, ge=1, le=10, description="Most pictures of one request.")
    max_prompt_chars: int = Field(
        32_000, ge=1, le=1_000_000, description="Longest prompt, in characters."
    )
    max_adapters: int = Field(
        4, ge=0, le=16, description="Most LoRA adapters of one request; 0 = no adapters."
    )
    max_reference_images: int = Field(
        MAX_REFERENCES,
        ge=0,
        le=MAX_REFERENCES,
        description="Most reference images of one request; 0 = none are taken.",
    )


class Enlarge(Spec):
    """Pictures larger than the model can draw are drawn at its native scale and enlarged."""

    above_side: int = Field(
        224, ge=PATCH, le=8192, description="Sizes with a longer side, in pixels, are enlarged."
    )
    native_short_side: int = Field(
        128, ge=PATCH, le=8192, description="Short side of what is drawn then, in pixels."
    )

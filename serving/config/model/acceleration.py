"""What draws a model's pictures faster, and what it costs."""

from __future__ import annotations

from pydantic import Field

from calotype.serving.config.base import Rule, Spec

MOST_REUSE = 0.9
"""Beyond it hardly a step is drawn at all."""


class Acceleration(Spec):
    """What draws faster at a price."""

    rules = (
        Rule(
            lambda s: s.devices_per_picture == 1 or s.step_cache == 0,
            "self.devicesPerPicture == 1 || self.stepCache <= 0.0",
            "several devices draw every step whole: set devicesPerPicture to 1 or stepCache to 0",
            ".stepCache",
        ),
        Rule(
            lambda s: s.devices_per_picture == 1 or not s.compile,
            "self.devicesPerPicture == 1 || !self.compile",
            "steps on several devices are not compiled: set devicesPerPicture to 1 or compile to "
            "false",
            ".compile",
        ),
    )

    step_cache: float = Field(
        0,
        ge=0,
        le=MOST_REUSE,
        description="For requests that do not say: the later blocks of a step are left out where "
        "the first one changed by less than this share. Pictures are then only nearly the same, "
        "and their recipe says so. 0 = every step is drawn whole, 0.1 = gentle.",
    )
    compile: bool = Field(
        False,
        description="true: the denoiser's blocks are compiled (torch.compile), while the model "
        "loads and again for every new size, about a minute each. Steps with adapters stay as "
        "they are. The image must hold a C++ compiler, which ours does if built with it.",
    )
    devices_per_picture: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs of a replica that draw each picture together: a picture is ready "
        "sooner, but a replica per GPU draws more of them. The resourceProfile must have so many "
        "GPUs, and the number must divide the model's attention heads.",
    )

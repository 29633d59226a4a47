"""What one generation is: the request that travels from the gateway to the engine, and its events.

Plain frozen values, JSON-serialisable, without torch: the gateway, the job database, the dispatcher
and the engine all speak of the same objects.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from calotype.serving.core.conditions import ControlRef, ReferenceUse
from calotype.serving.core.errors import CalotypeError, InvalidRequest
from calotype.serving.core.json_object import JsonObject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    """One image: uint8, shape [height, width, 3], RGB."""

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")

MAX_SEED = 2**63 - 1

SAMPLER_ENTRY_POINTS = "calotype.samplers"
"""Entry-point group by which an installed package adds samplers."""

SAMPLER_NAMES = ("flow-euler", "flow-heun", "flow-dpmpp-2m", "flow-unipc", "flow-lcm")
"""The samplers of this package."""

MAX_REFERENCES = 10
"""Reference images of one request."""


def sampler_names() -> tuple[str, ...]:
    """Every sampler that a request may name, those of installed packages included."""
    added = importlib.metadata.entry_points(group=SAMPLER_ENTRY_POINTS).names
    return (*SAMPLER_NAMES, *sorted(set(added) - set(SAMPLER_NAMES)))


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Width and height in pixels."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str, param: str = "size") -> ImageSize:
        """Reads ``"1024x768"``.

        Raises:
            InvalidRequest: the text is not two whole numbers joined by ``x``.
        """
        match = _SIZE.fullmatch(text.strip().lower())
        if match is None:
            raise InvalidRequest(
                f"{param} must be WIDTHxHEIGHT in pixels, for example '1024x1024'; got {text!r}.",
                param=param,
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.width * self.height


def same_proportions(image: ImageSize, size: ImageSize) -> bool:
    """Whether ``image`` differs from ``size`` by no more than rounding its sides to whole patches
    can do, so that it may be stretched to it."""
    allowed = 0.005 + 8 / size.width + 8 / size.height
    return abs(image.width * size.height / (image.height * size.width) - 1) <= allowed


REFERENCE_MIN_SIDE = 64
REFERENCE_MAX_ASPECT = 8


def check_reference(size: ImageSize, param: str) -> None:
    """Raises InvalidRequest for an image that is too small or too narrow to be looked at."""
    if min(size.width, size.height) < REFERENCE_MIN_SIDE:
        raise InvalidRequest(
            f"{param} is {size}; each side of a picture to look at must be at least "
            f"{REFERENCE_MIN_SIDE} pixels.",
            param=param,
        )
    if max(size.width, size.height) > REFERENCE_MAX_ASPECT * min(size.width, size.height):
        raise InvalidRequest(
            f"{param} is {size}; the long side of a picture to look at may be at most "
            f"{REFERENCE_MAX_ASPECT} times the short one.",
            param=param,
        )


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A LoRA adapter by name, and how strongly it is applied (0 = not at all)."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the noise is taken away.

    Attributes:
        guidance_scale: how closely the prompt is followed. With a negative prompt and no
            ``true_guidance_scale`` it weighs the two passes, else it is told to the denoiser.
        sigmas: noise levels before the model's shift, falling from at most 1, one for each step;
            empty for the model's own.
        true_guidance_scale: weight of prompt against negative prompt, beside the guidance that is
            told to the denoiser.
        step_cache: reuse the last step's result where the first block changed by less than this
            share; 0 never does, 0.1 is gentle.
    """

    steps: int
    guidance_scale: float
    sampler: str = "flow-euler"
    sigmas: tuple[float, ...] = ()
    true_guidance_scale: float | None = None
    step_cache: float = 0.0


def check_sigmas(sigmas: Sequence[float], steps: int) -> None:
    """Raises InvalidRequest where own noise levels are not one for each step, falling from 1."""
    if not sigmas:
        return
    if len(sigmas) != steps:
        raise InvalidRequest(
            f"sigmas must hold one number for each of the {steps} steps; got {len(sigmas)}.",
            param="sigmas",
        )
    # Written so that NaN fails, too.
    falling = all(a > b for a, b in itertools.pairwise(sigmas))
    if not (falling and sigmas[0] <= 1 and sigmas[-1] > 0):
        raise InvalidRequest(
            "sigmas must fall from at most 1 to above 0, for example [1.0, 0.75, 0.5, 0.25]; got "
            f"{list(sigmas)[:20]}.",
            param="sigmas",
        )


@dataclass(frozen=True, slots=True)
class Margins:
    """Pixels by which an image is continued beyond its edges."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and the ``n`` images wanted of it; image ``i`` is drawn with ``seed + i``.

    ``rendered_size`` is what the denoiser draws; where it differs from ``size`` (a small model
    asked for a large image) the drawn one is enlarged to ``size`` afterwards.
    """

    id: str
    prompt: str
    size: ImageSize
    rendered_size: ImageSize
    sampling: SamplingParams
    seed: int
    n: int = 1
    adapters: tuple[AdapterRef, ...] = ()
    preview_every: int = 0
    """Emit a `Preview` every so many steps; 0 = never."""
    priority: int = 0
    """Higher runs first."""
    negative_prompt: str | None = None
    """What the image shall not show; costs a second denoiser pass a step."""
    image: str | None = None
    """Name of the image to start from; the bytes are given to the engine by this name."""
    mask: str | None = None
    """Name of the mask: what it marks is drawn anew, the rest of ``image`` stays as it is."""
    references: tuple[str, ...] = ()
    """Names of images that the model looks at, at most `MAX_REFERENCES`."""
    reference_uses: tuple[ReferenceUse, ...] = ()
    """How each of them is looked at; empty = as the model was trained."""
    controls: tuple[ControlRef, ...] = ()
    """Control maps that the image follows; their hints are summed."""
    strength: float | None = None
    """How far ``image`` is noised, above 0 to 1; None is 1 with a mask or margins, else 0.8."""
    expand: Margins | None = None
    """Continue ``image`` by these margins; its size with them is ``rendered_size``."""
    tenant: str = ""
    """Whose request it is; steps are shared out fairly between tenants."""
    weight: float = 1.0
    """The tenant's share of the steps against others."""
    deadline_seconds: float | None = None
    """Time from `Engine.add` until the last image; what cannot keep it fails early."""
    checkpoint_every: int = 0
    """Emit a `Checkpoint` every so many steps; 0 = never."""

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of LoRAs and control adapters."""
        named = [adapter.name for adapter in self.adapters]
        return (*named, *(control.name for control in self.controls))

    def to_payload(self) -> JsonObject:
        return {
            "id": self.id,
            "prompt": self.prompt,
            "size": str(self.size),
            "rendered_size": str(self.rendered_size),
            "steps": self.sampling.steps,
            "guidance_scale": self.sampling.guidance_scale,
            "sampler": self.sampling.sampler,
            "seed": self.seed,
            "n": self.n,
            "loras": [{"id": a.name, "scale": a.scale} for a in self.adapters],
            "preview_every": self.preview_every,
            "priority": self.priority,
            "sigmas": list(self.sampling.sigmas),
            "true_guidance_scale": self.sampling.true_guidance_scale,
            "step_cache": self.sampling.step_cache,
            "negative_prompt": self.negative_prompt,
            "image": self.image,
            "mask": self.mask,
            "references": list(self.references),
            "reference_uses": [use.to_payload() for use in self.reference_uses],
            "controls": [control.to_payload() for control in self.controls],
            "strength": self.strength,
            "expand": None if self.expand is None else asdict(self.expand),
            "tenant": self.tenant,
            "weight": self.weight,
            "deadline_seconds": self.deadline_seconds,
            "checkpoint_every": self.checkpoint_every,
        }

    @classmethod
    def from_payload(cls, payload: JsonObject) -> GenerationRequest:
        """Fields that this release does not know are ignored."""
        return cls(
            id=payload["id"],
            prompt=payload["prompt"],
            size=ImageSize.parse(payload["size"]),
            rendered_size=ImageSize.parse(payload["rendered_size"]),
            sampling=SamplingParams(
                payload["steps"],
                payload["guidance_scale"],
                payload["sampler"],
                tuple(payload.get("sigmas", ())),
                payload.get("true_guidance_scale"),
                payload.get("step_cache", 0.0),
            ),
            seed=payload["seed"],
            n=payload["n"],
            adapters=tuple(AdapterRef(a["id"], a["scale"]) for a in payload["loras"]),
            preview_every=payload.get("preview_every", 0),
            priority=payload.get("priority", 0),
            negative_prompt=payload.get("negative_prompt"),
            image=payload.get("image"),
            mask=payload.get("mask"),
            references=tuple(payload.get("references", ())),
            reference_uses=tuple(map(ReferenceUse.from_payload, payload.get("reference_uses", ()))),
            controls=tuple(map(ControlRef.from_payload, payload.get("controls", ()))),
            strength=payload.get("strength"),
            expand=Margins(**payload["expand"]) if payload.get("expand") else None,
            tenant=payload.get("tenant", ""),
            weight=payload.get("weight", 1.0),
            deadline_seconds=payload.get("deadline_seconds"),
            checkpoint_every=payload.get("checkpoint_every", 0),
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """``step`` of ``steps`` denoise steps are done for the whole request."""

    request_id: str
    step: int
    steps: int
    done_ns: int = field(default_factory=time.time_ns, compare=False)
    """When the step was done (`time.time_ns`); it may be heard of a moment later."""
    seconds: float = field(default=0.0, compare=False)
    """Measured device time of the request so far, its share of each batch."""


@dataclass(frozen=True, slots=True)
class Preview:
    """A decoded estimate of the finished image ``index``, after ``step`` steps."""

    request_id: str
    index: int
    step: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Finished:
    """The request is drawn: the images in their order. Terminal."""

    request_id: str
    images: tuple[Pixels, ...]
    denoise_seconds: float
    """Measured time in the denoiser and the decoder, this request's share of each batch."""
    evaluations: int = 0
    """Denoiser passes that its images took, skipped ones included."""
    skipped: int = 0
    """Those of them that reused the last step's result (``step_cache``)."""
    reference_tokens: int = 0
    """Tokens of its reference images, as the model looked at them."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without images; ``Cancelled`` after an abort. Terminal."""

    request_id: str
    error: CalotypeError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the request is after ``step`` steps; `Engine.add` goes on from ``data``."""

    request_id: str
    step: int
    data: bytes


Event = Progress | Preview | Checkpoint | Finished | Failed

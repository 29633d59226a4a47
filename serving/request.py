"""What one generation is: the request that travels from the gateway to the engine, and its events.

Plain frozen values, JSON-serialisable, without torch: the gateway, the job store, the dispatcher
and the engine all speak of the same objects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype.serving.errors import CalotypeError, InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    """One picture: uint8, shape [height, width, 3], RGB."""

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")

MAX_SEED = 2**63 - 1


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


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A LoRA adapter by name, and how strongly it is applied (0 = not at all)."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the noise is taken away: steps, distilled guidance, sampler name."""

    steps: int
    guidance_scale: float
    sampler: str = "flow-euler"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and the ``n`` pictures wanted of it; picture ``i`` is drawn with ``seed + i``.

    ``rendered_size`` is what the denoiser draws; where it differs from ``size`` (a small model
    asked for a large picture) the drawn one is enlarged to ``size`` afterwards.
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

    def to_payload(self) -> dict[str, Any]:
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
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> GenerationRequest:
        return cls(
            id=payload["id"],
            prompt=payload["prompt"],
            size=ImageSize.parse(payload["size"]),
            rendered_size=ImageSize.parse(payload["rendered_size"]),
            sampling=SamplingParams(
                payload["steps"], payload["guidance_scale"], payload["sampler"]
            ),
            seed=payload["seed"],
            n=payload["n"],
            adapters=tuple(AdapterRef(a["id"], a["scale"]) for a in payload["loras"]),
            preview_every=payload.get("preview_every", 0),
            priority=payload.get("priority", 0),
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """``step`` of ``steps`` denoise steps are done for the whole request."""

    request_id: str
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A decoded estimate of the finished picture ``index``, after ``step`` steps."""

    request_id: str
    index: int
    step: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Finished:
    """The request is drawn: one picture per image, in order. Terminal."""

    request_id: str
    images: tuple[Pixels, ...]
    denoise_seconds: float
    """Measured time in the denoiser and the decoder, this request's share of each batch."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without pictures; ``Cancelled`` after an abort. Terminal."""

    request_id: str
    error: CalotypeError


Event = Progress | Preview | Finished | Failed

"""What a generator hands back for a job: the images that it stored, and how it made them.

The worker encodes each allowed image, puts it into the blob store, and completes the job with a
`GenerationResult`. Images that the safety stage refused are named in ``blocked`` and stored
nowhere; images for a reviewer are stored sealed and named in ``held``. Parts of it are columns of
the job's row: `JobOutput`, `TokenUsage` and `JobMetrics` say how. Of payloads of other releases
unknown fields are ignored; a higher version of the whole result is refused (`core.payloads`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from calotype.serving.core.decision import Decision
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import check_version, known_fields, without_none
from calotype.serving.core.request import Finished, GenerationRequest, ImageSize

RESULT_VERSION = 1
CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
TOKEN_SIDE = 16
"""An image costs one token per started square of this many pixels (docs/api.md)."""


@dataclass(frozen=True, slots=True)
class ImageResult:
    """One stored image."""

    asset_id: str
    blob_key: str
    index: int
    """Position in the batch, from 0; gaps are the blocked ones."""
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    flagged: bool = False


@dataclass(frozen=True, slots=True)
class MapResult:
    """A control map as it was used, stored as PNG."""

    asset_id: str
    blob_key: str
    index: int
    """Place of its entry in ``controlnets``, from 0."""
    width: int
    height: int
    sha256: str
    fitted: str | None = None
    """The size that it was given in, where that is another one."""


@dataclass(frozen=True, slots=True)
class BlockedImage:
    """A drawn image that nobody may see."""

    index: int
    categories: list[str]
    decision_id: str | None = None
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class HeldImage:
    """A drawn image that waits for a reviewer; its file is sealed."""

    asset_id: str
    blob_key: str
    seal: str = field(repr=False)
    """The key of this file, in hexadecimal."""
    index: int
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    """Of the file before it was sealed."""
    categories: list[str]
    decision_id: str | None = None
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class JobOutput:
    """The column ``output`` of a job that succeeded."""

    images: Sequence[ImageResult]
    blocked: Sequence[BlockedImage] = ()
    maps: Sequence[MapResult] = ()

    def to_payload(self) -> JsonObject:
        maps = {"maps": [asdict(one) for one in self.maps]} if self.maps else {}
        return {
            "images": [asdict(image) for image in self.images],
            "blocked": [asdict(image) for image in self.blocked],
            **maps,
        }


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """What a request costs in tokens; as JSON the ``usage`` object of OpenAI's Images API."""

    text_tokens: int = 0
    image_tokens: int = 0
    """Of the drawn images."""
    seen_tokens: int = 0
    """Of the reference images, as the model looked at them."""

    @classmethod
    def of(cls, text_tokens: int, sizes: Sequence[ImageSize], seen: int = 0) -> TokenUsage:
        """Args:
        sizes: of the images that were drawn.
        seen: tokens of the reference images.
        """
        return cls(text_tokens, sum(image_tokens(size) for size in sizes), seen)

    def to_payload(self) -> JsonObject:
        given = self.text_tokens + self.seen_tokens
        return {
            "input_tokens": given,
            "output_tokens": self.image_tokens,
            "total_tokens": given + self.image_tokens,
            "input_tokens_details": {
                "text_tokens": self.text_tokens,
                "image_tokens": self.seen_tokens,
            },
            "output_tokens_details": {"text_tokens": 0, "image_tokens": self.image_tokens},
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, object]) -> TokenUsage:
        details = payload.get("input_tokens_details")
        seen = details.get("image_tokens", 0) if isinstance(details, Mapping) else 0
        given, drawn = payload.get("input_tokens", 0), payload.get("output_tokens", 0)
        counts = (int(n) if isinstance(n, int) else 0 for n in (given, drawn, seen))
        given, drawn, seen = counts
        return cls(given - seen, drawn, seen)


@dataclass(frozen=True, slots=True)
class JobMetrics:
    """The column ``metrics`` of a job. What is None is not written."""

    gpu_seconds: float = 0.0
    """Measured device time, of all devices together."""
    queue_ms: int | None = None
    megapixels: float | None = None
    """Of all images as they were asked for."""
    steps: int | None = None
    rendered_size: str | None = None
    draw_ms: int | None = None
    moderation_ms: int | None = None
    devices: int | None = None
    """Devices that drew each image together; None = one."""
    passes: int | None = None
    """Denoiser passes, and those of them that ``step_cache`` skipped."""
    passes_skipped: int | None = None
    maps_fitted: Sequence[str] | None = None
    """Control maps of another size, such as ``controlnets[0]: 64x64 to 128x128``."""
    warnings: Sequence[str] | None = None
    """Sentences for the client."""

    @classmethod
    def of(cls, request: GenerationRequest, finished: Finished, devices: int) -> JobMetrics:
        """What the engine measured."""
        skips = bool(request.sampling.step_cache)
        return cls(
            gpu_seconds=round(devices * finished.denoise_seconds, 4),
            megapixels=round(request.n * request.size.pixels / 1e6, 4),
            steps=request.sampling.steps,
            rendered_size=str(request.rendered_size),
            devices=devices if devices > 1 else None,
            passes=finished.evaluations if skips else None,
            passes_skipped=finished.skipped if skips else None,
        )

    @property
    def drawing_seconds(self) -> float:
        """Seconds for which a replica drew; all of its devices at once."""
        return self.gpu_seconds / (self.devices or 1)

    def to_payload(self) -> JsonObject:
        found = without_none(asdict(self))
        sentences = {"warnings": self.warnings, "maps_fitted": self.maps_fitted}
        return found | {name: list(given) for name, given in sentences.items() if given}

    @classmethod
    def from_payload(cls, payload: Mapping[str, object]) -> JobMetrics:
        return cls(**known_fields(cls, payload))


@dataclass(frozen=True, slots=True)
class GenerationResult:
    images: Sequence[ImageResult]
    blocked: Sequence[BlockedImage] = ()
    metrics: JobMetrics = field(default_factory=JobMetrics)
    usage: TokenUsage = field(default_factory=TokenUsage)
    decisions: Sequence[Decision] = ()
    """The safety stage's decision for every drawn image, kept in the job's moderation record."""
    prompt_decision: Decision | None = None
    """The prompt's, where the policy changed meanwhile and it was checked again."""
    held: Sequence[HeldImage] = ()
    maps: Sequence[MapResult] = ()

    def to_payload(self) -> JsonObject:
        prompt = self.prompt_decision
        return {
            "version": RESULT_VERSION,
            **JobOutput(self.images, self.blocked, self.maps).to_payload(),
            "metrics": self.metrics.to_payload(),
            "usage": self.usage.to_payload(),
            "decisions": [decision.to_payload() for decision in self.decisions],
            "prompt_decision": None if prompt is None else prompt.to_payload(),
            "held": [asdict(image) for image in self.held],
        }

    @classmethod
    def from_payload(cls, payload: JsonObject) -> GenerationResult:
        """Raises EngineError for a higher version."""
        check_version(payload, RESULT_VERSION, "A generation result")
        prompt = payload.get("prompt_decision")
        return cls(
            images=[ImageResult(**known_fields(ImageResult, i)) for i in payload["images"]],
            blocked=[
                BlockedImage(**known_fields(BlockedImage, i)) for i in payload.get("blocked", ())
            ],
            metrics=JobMetrics.from_payload(payload.get("metrics", {})),
            usage=TokenUsage.from_payload(payload.get("usage", {})),
            decisions=[Decision.from_payload(found) for found in payload.get("decisions", ())],
            prompt_decision=None if prompt is None else Decision.from_payload(prompt),
            held=[HeldImage(**known_fields(HeldImage, i)) for i in payload.get("held", ())],
            maps=[MapResult(**known_fields(MapResult, i)) for i in payload.get("maps", ())],
        )


def image_tokens(size: ImageSize) -> int:
    return -(-size.width // TOKEN_SIDE) * -(-size.height // TOKEN_SIDE)

"""What a generator hands back for a job: the schema between worker, store and gateway.

The worker encodes each allowed picture, puts it into the blob store, and completes the job with
`GenerationResult.to_payload()`. Pictures that the safety stage refused are named in ``blocked``
and stored nowhere. When nothing is left the dispatcher ends the job as `ContentBlocked`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from calotype.moderation.policy.refusals import held_message, refusal_message
from calotype.serving.core.errors import ContentBlocked
from calotype.serving.core.request import ImageSize

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
HELD_FOR_REVIEW = "held_for_review"
"""Code of the error of a job whose pictures all wait for a person."""
TOKEN_SIDE = 16
"""A picture costs one token per started square of this many pixels (api.md section 3)."""


@dataclass(frozen=True, slots=True)
class ImageResult:
    """One stored picture."""

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
class BlockedImage:
    """A drawn picture that nobody may see."""

    index: int
    categories: list[str]
    decision_id: str | None = None
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class HeldImage:
    """A drawn picture that waits for a person; its file is sealed."""

    asset_id: str
    blob_key: str
    index: int
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    """Of the file itself."""
    categories: list[str]
    decision_id: str | None = None
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    images: list[ImageResult]
    blocked: list[BlockedImage] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    """Must hold ``gpu_seconds``: measured device time, of all devices together."""
    usage: dict[str, Any] = field(default_factory=dict)
    """`openai_usage(...)`."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """The safety stage's decision for every drawn picture, kept in the job's moderation log."""
    prompt_decision: dict[str, Any] | None = None
    """The prompt's, where the policy changed meanwhile and it was judged again."""
    held: list[HeldImage] = field(default_factory=list)

    @property
    def drawing_seconds(self) -> float:
        """Seconds that a replica drew; all of its ``devices`` at once."""
        seconds = float(self.metrics.get("gpu_seconds", 0.0))
        return seconds / int(self.metrics.get("devices", 1))

    def to_payload(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> GenerationResult:
        return cls(
            images=[ImageResult(**image) for image in payload["images"]],
            blocked=[BlockedImage(**image) for image in payload.get("blocked", [])],
            metrics=dict(payload.get("metrics", {})),
            usage=dict(payload.get("usage", {})),
            decisions=list(payload.get("decisions", [])),
            prompt_decision=payload.get("prompt_decision"),
            held=[HeldImage(**image) for image in payload.get("held", [])],
        )


def image_tokens(size: ImageSize) -> int:
    return -(-size.width // TOKEN_SIDE) * -(-size.height // TOKEN_SIDE)


def openai_usage(text_tokens: int, sizes: Sequence[ImageSize]) -> dict[str, Any]:
    """The ``usage`` object of OpenAI's Images API for ``sizes``, the pictures that were drawn."""
    output = sum(image_tokens(size) for size in sizes)
    return {
        "input_tokens": text_tokens,
        "output_tokens": output,
        "total_tokens": text_tokens + output,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": 0},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": output},
    }


APPEALS = "/v1/moderation/appeals"
"""Where a refusal is appealed against, on the gateway that answered."""


def held_error(held: Sequence[Mapping[str, Any]], request_id: str) -> ContentBlocked:
    """Every picture that could be shown waits for a person.

    Args:
        held: as of a job's moderation: ``index``, ``case_id``, ``asset_id``, ``categories``.
    """
    names = sorted({str(name) for entry in held for name in entry["categories"]})
    return ContentBlocked(
        "Your request was held by the safety system: a person looks at the pictures before "
        "anybody sees them, and those that are approved appear as the assets named in "
        f"error.moderation.held. Request ID {request_id}. safety_violations=[{','.join(names)}].",
        code=HELD_FOR_REVIEW,
        details={
            "moderation_details": {"moderation_stage": "output", "categories": names},
            "moderation": {
                "held": [dict(entry) for entry in held],
                "user_message": held_message(),
            },
        },
    )


def blocked_error(
    stage: str,
    categories: Sequence[str],
    request_id: str,
    *,
    decision_id: str | None = None,
    policy: str | None = None,
    own_words: str | None = None,
) -> ContentBlocked:
    """The refusal of api.md section 3; ``stage`` is ``input`` or ``output``.

    LiteLLM recognises the first sentence, so its wording is part of the interface. The sentence for
    people is ``moderation.user_message``, which the gateway says in the caller's language.

    Args:
        own_words: what the policy's owner tells people, if anything.
    """
    names = sorted(set(categories))
    return ContentBlocked(
        "Your request was rejected as a result of the safety system. If you believe this is an "
        "error, contact your administrator and include the request ID "
        f"{request_id}. safety_violations=[{','.join(names)}].",
        details={
            "moderation_details": {"moderation_stage": stage, "categories": names},
            "moderation": {
                "decision_id": decision_id,
                "policy": policy,
                "appeal_url": APPEALS if decision_id else None,
                "user_message": refusal_message(names, own_words),
            },
        },
    )

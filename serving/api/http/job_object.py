"""A job as clients see it: in answers, in events and in webhooks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from calotype.serving.api.http.failures import error_object, localized
from calotype.serving.core.errors import error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.outage import waits_for
from calotype.serving.jobs.records import JobRecord
from calotype.serving.observability.tracing import trace_id_of

SHOWN_INPUT = (
    *("prompt", "model", "n", "size", "quality", "style", "revised_prompt", "seed", "steps"),
    *("guidance_scale", "loras", "output_format", "output_compression", "response_format"),
    *("stream", "partial_images", "moderation", "safety_tolerance", "safety_identifier"),
    *("controlnets", "reference_images", "request_id", "recipe_changes", "warnings"),
)
"""The fields of a job's ``input`` that clients see: what was asked, after defaults. The others are
for the processes of the service (`creation.create_or_join`)."""
SHOWN_METRICS = (
    *("gpu_seconds", "queue_ms", "draw_ms", "moderation_ms", "megapixels", "steps"),
    *("rendered_size", "devices", "passes", "passes_skipped", "maps_fitted"),
)
SHOWN_USAGE = (
    *("input_tokens", "output_tokens", "total_tokens"),
    *("input_tokens_details", "output_tokens_details"),
)
SHOWN_HELD = ("index", "case_id", "asset_id", "categories", "status")


class ImageObject(TypedDict):
    """A finished picture of a job."""

    asset_id: str
    url: str
    index: int
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    flagged: bool


class MapObject(TypedDict):
    """A control map as it was used."""

    index: int
    asset_id: str
    url: str
    width: int
    height: int
    sha256: str
    fitted: str | None


class ImagesObject(TypedDict):
    images: list[ImageObject]
    controlnets: NotRequired[list[MapObject]]


class JobUrls(TypedDict):
    get: str
    cancel: str
    events: str


class JobObject(TypedDict):
    """See docs/api.md; moments are seconds since the epoch."""

    id: str
    object: Literal["image.job"]
    type: str
    model: str
    status: str
    progress: int
    queue_position: int | None
    estimated_seconds: float | None
    promised_by: int | None
    waiting_for: str | None
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    input: JsonObject
    recipe: JsonObject | None
    recipe_hash: str | None
    output: ImagesObject | None
    error: JsonObject | None
    moderation: JsonObject | None
    usage: JsonObject | None
    metrics: JsonObject | None
    metadata: dict[str, str]
    trace_id: str | None
    urls: JobUrls


def shown(stored: JsonObject | None, names: Collection[str]) -> JsonObject:
    """The fields of a stored object that clients may see, in their stored order."""
    return {name: value for name, value in (stored or {}).items() if name in names}


def usage_of(job: JobRecord) -> JsonObject | None:
    """The tokens of a job, as OpenAI's Images API counts them."""
    return None if job.usage is None else shown(job.usage, SHOWN_USAGE)


def describe_job(
    job: JobRecord, base_url: str, address_of: Callable[[str], str], language: str = ""
) -> JobObject:
    """The job object of docs/api.md; pictures are addresses.

    Args:
        address_of: asset id -> where the picture can be had.
        language: ``Accept-Language`` of who asks; else that of who made the job counts.
    """
    here = f"{base_url}/v1/jobs/{job.id}"
    return {
        "id": job.id,
        "object": "image.job",
        "type": job.type,
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "queue_position": None,
        "estimated_seconds": None,
        "promised_by": _seconds(job.promised),
        "waiting_for": outage.part if (outage := waits_for(job)) is not None else None,
        "created_at": int(job.created),
        "started_at": _seconds(job.started),
        "completed_at": _seconds(job.completed),
        "expires_at": _seconds(job.expires),
        "input": shown(job.input, SHOWN_INPUT),
        "recipe": job.recipe,
        "recipe_hash": job.recipe_hash,
        "output": _output(job, address_of),
        "error": _error(job, language),
        "moderation": _moderation(job, address_of),
        "usage": usage_of(job),
        "metrics": None
        if job.metrics is None
        else shown(job.metrics, (*SHOWN_METRICS, "warnings")),
        "metadata": job.metadata,
        "trace_id": trace_id_of(job.input.get("traceparent")),
        "urls": {"get": here, "cancel": f"{here}/cancel", "events": f"{here}/events"},
    }


def _error(job: JobRecord, language: str) -> JsonObject | None:
    if job.error is None:
        return None
    language = language or str(job.input.get("language", ""))
    return error_object(localized(error_from_payload(job.error), language))


def map_objects(job: JobRecord, address_of: Callable[[str], str]) -> list[MapObject]:
    """The control maps of a job that succeeded."""
    return [
        {
            "index": one["index"],
            "asset_id": one["asset_id"],
            "url": address_of(one["asset_id"]),
            "width": one["width"],
            "height": one["height"],
            "sha256": one["sha256"],
            "fitted": one["fitted"],
        }
        for one in (job.output or {}).get("maps", [])
    ]


def _output(job: JobRecord, address_of: Callable[[str], str]) -> ImagesObject | None:
    if job.output is None:
        return None
    found: ImagesObject = {
        "images": [
            {
                "asset_id": image["asset_id"],
                "url": address_of(image["asset_id"]),
                "index": image["index"],
                "seed": image["seed"],
                "width": image["width"],
                "height": image["height"],
                "content_type": image["content_type"],
                "sha256": image["sha256"],
                "flagged": image["flagged"],
            }
            for image in job.output["images"]
        ]
    }
    if maps := map_objects(job, address_of):
        found["controlnets"] = maps
    return found


def _moderation(job: JobRecord, address_of: Callable[[str], str]) -> JsonObject | None:
    """What was decided, without scores: those would teach how to get around the policy."""
    if job.moderation is None:
        return None
    stages = {"input": [job.moderation.get("input")], "output": job.moderation.get("output") or []}
    found: JsonObject = {
        stage: [
            {
                "decision_id": decision.get("id"),
                "policy": decision.get("policy"),
                "verdict": decision.get("verdict"),
                "categories": decision.get("categories", []),
            }
            for decision in decisions
            if decision
        ]
        for stage, decisions in stages.items()
    }
    if "held" in job.moderation:
        found["held"] = [_held(entry, address_of) for entry in job.moderation["held"]]
    return found


def _held(entry: JsonObject, address_of: Callable[[str], str]) -> JsonObject:
    """A picture that waits for a person, and its address once it was released."""
    released = entry["status"] == "released"
    return shown(entry, SHOWN_HELD) | ({"url": address_of(entry["asset_id"])} if released else {})


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)

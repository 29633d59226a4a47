"""From a finished job to the answer of OpenAI's Images API (docs/api.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from calotype.serving.api.generation.access import level_warning
from calotype.serving.api.http.failures import quarantined
from calotype.serving.api.http.job_object import (
    SHOWN_HELD,
    SHOWN_METRICS,
    map_objects,
    shown,
    usage_of,
)
from calotype.serving.api.http.signing import content_url
from calotype.serving.api.http.stored import StoredPictures, json_response
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import Cancelled, DeadlineExceeded, NotFound, error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import JobRecord
from calotype.serving.observability import metrics


def images_body(
    gateway: Gateway,
    base: str,
    job: JobRecord,
    images: Sequence[JsonObject],
    pictures: StoredPictures,
) -> JsonObject:
    """`ImagesResponse` of a job that is over, with marks in place of its pictures.

    Args:
        images: those of `shown_images`.
    """
    data = [_item(gateway, base, job, image, pictures) for image in images]
    body = described(job) | {"data": data, "usage": usage_of(job)}
    maps = map_objects(job, lambda asset: content_url(gateway, base, asset))
    return body | ({"controlnets": maps} if maps else {})


def drawn_images(job: JobRecord) -> list[JsonObject]:
    """The pictures of a job that may be seen.

    Raises:
        CalotypeError: the one with which the job ended, or it is not over in time.
    """
    if not job.over:
        raise DeadlineExceeded("The job was not finished within the time allowed for it.")
    if job.purged is not None:
        raise NotFound(f"The job '{job.id}' has expired.", code="expired")
    if job.status != "succeeded" or job.output is None:
        _count_refusal(job)
        raise error_from_payload(job.error) if job.error else Cancelled("The job was canceled.")
    _count_success(job)
    return list(job.output["images"])


def shown_images(gateway: Gateway, job: JobRecord) -> list[JsonObject]:
    """The pictures of a job that are still there: neither deleted nor taken down.

    Raises:
        NotFound: none is.
        CalotypeError: see `drawn_images`.
    """
    images = drawn_images(job)
    with_adapters = (job.recipe or {}).get("adapters")
    if with_adapters and gateway.database.origins.quarantined_job(job.id):
        raise quarantined(f"The job '{job.id}'")
    names = [image["asset_id"] for image in images]
    there = gateway.database.files.existing_assets(names)
    shown = [image for image in images if image["asset_id"] in there]
    if images and not shown:
        raise NotFound(f"The pictures of the job '{job.id}' were deleted.", code="deleted")
    return shown


def described(job: JobRecord) -> JsonObject:
    """What an answer says beside the pictures."""
    body: JsonObject = {
        "created": int(job.created),
        "background": "opaque",
        "output_format": job.input["output_format"],
        "quality": job.input["quality"],
        "size": job.input["size"],
        "job_id": job.id,
        "model": job.model,
        "metrics": shown(job.metrics, SHOWN_METRICS),
        "recipe_hash": job.recipe_hash,
        "recipe": job.recipe,
    }
    for name in ("safety_identifier", "recipe_changes"):
        if name in job.input:
            body[name] = job.input[name]
    # The gateway warns of what it did not grant, the worker of what the model could not read.
    warnings = [
        *job.input.get("warnings", []),
        *level_warning(job.moderation),
        *(job.metrics or {}).get("warnings", []),
    ]
    if warnings:
        body["warnings"] = warnings
    blocked: list[JsonObject] = (job.output or {}).get("blocked", [])
    if blocked:
        body["moderation"] = {
            "blocked": [
                {
                    "index": image["index"],
                    "moderation_stage": "output",
                    "categories": image["categories"],
                }
                for image in blocked
            ]
        }
    held = (job.moderation or {}).get("held")
    if held:
        body.setdefault("moderation", {})["held"] = [shown(entry, SHOWN_HELD) for entry in held]
    return body


async def images_response(
    gateway: Gateway, request: Request, job: JobRecord, processing_ms: int
) -> Response:
    """The answer of the synchronous routes. Raises like `images_body`."""
    pictures = StoredPictures(gateway.blobs)
    images = await asyncio.to_thread(shown_images, gateway, job)
    body = images_body(gateway, gateway.base_url(request), job, images, pictures)
    blocked: list[JsonObject] = (job.output or {}).get("blocked", [])
    headers = {
        "openai-version": "2020-10-01",
        "openai-processing-ms": str(processing_ms),
        "x-job-id": job.id,
        "x-image-seeds": ",".join(str(image["seed"]) for image in images),
        "x-image-flagged": ",".join(str(int(image["flagged"])) for image in images),
    }
    if job.recipe_hash is not None:
        headers["x-recipe-hash"] = job.recipe_hash
    if blocked:
        headers["x-images-blocked"] = str(len(blocked))
    return await json_response(pictures, body, headers)


def _item(
    gateway: Gateway, base: str, job: JobRecord, image: JsonObject, pictures: StoredPictures
) -> JsonObject:
    item: JsonObject = {}
    if job.input["response_format"] == "url":
        item["url"] = content_url(gateway, base, image["asset_id"])
    else:
        item["b64_json"] = pictures.mark(image["blob_key"])
    item |= {"seed": image["seed"], "flagged": image["flagged"]}
    if "revised_prompt" in job.input:
        item["revised_prompt"] = job.input["revised_prompt"]
    return item


def _count_success(job: JobRecord) -> None:
    output = job.output or {}
    metrics.IMAGES.labels(job.model).inc(len(output.get("images", [])))
    metrics.BLOCKED.labels(job.model, "output").inc(len(output.get("blocked", [])))
    measured = job.metrics or {}
    metrics.GPU_SECONDS.labels(job.model).inc(float(measured.get("gpu_seconds", 0)))
    if skipped := measured.get("passes_skipped"):
        metrics.PASSES_SKIPPED.labels(job.model).inc(skipped)


def _count_refusal(job: JobRecord) -> None:
    details = (job.error or {}).get("details") or {}
    stage = (details.get("moderation_details") or {}).get("moderation_stage")
    if stage in ("input", "output"):
        metrics.BLOCKED.labels(job.model, stage).inc()

"""A job as clients see it: in answers, in events and in webhooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calotype.serving.api.http.failures import error_object
from calotype.serving.api.http.localize import localized
from calotype.serving.core.errors import error_from_payload
from calotype.serving.jobs.records import JobRecord
from calotype.serving.observability.tracing import trace_id_of

# Of the stored input: not the client's words.
_HIDDEN = frozenset({"language", "prompt_in_files", "scope", "seal", "traceparent"})


def describe_job(
    job: JobRecord, base_url: str, address_of: Callable[[str], str], language: str = ""
) -> dict[str, Any]:
    """The job object of api.md section 4; pictures are addresses.

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
        "created_at": int(job.created),
        "started_at": _seconds(job.started),
        "completed_at": _seconds(job.completed),
        "expires_at": _seconds(job.expires),
        "input": {name: value for name, value in job.input.items() if name not in _HIDDEN},
        "recipe": job.recipe,
        "recipe_hash": job.recipe_hash,
        "output": _output(job, address_of),
        "error": _error(job, language),
        "moderation": _moderation(job, address_of),
        "usage": job.usage,
        "metrics": job.metrics,
        "metadata": job.metadata,
        "trace_id": trace_id_of(job.input.get("traceparent")),
        "urls": {"get": here, "cancel": f"{here}/cancel", "events": f"{here}/events"},
    }


def _error(job: JobRecord, language: str) -> dict[str, Any] | None:
    if job.error is None:
        return None
    language = language or str(job.input.get("language", ""))
    return error_object(localized(error_from_payload(job.error), language))


def _output(job: JobRecord, address_of: Callable[[str], str]) -> dict[str, Any] | None:
    if job.output is None:
        return None
    return {
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


def _moderation(job: JobRecord, address_of: Callable[[str], str]) -> dict[str, Any] | None:
    """What was decided, without scores: those would teach how to get around the policy."""
    if job.moderation is None:
        return None
    stages = {"input": [job.moderation.get("input")], "output": job.moderation.get("output") or []}
    told: dict[str, Any] = {
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
        told["held"] = [_held(entry, address_of) for entry in job.moderation["held"]]
    return told


def _held(entry: dict[str, Any], address_of: Callable[[str], str]) -> dict[str, Any]:
    """A picture that waits for a person, and its address once it was released."""
    released = entry["status"] == "released"
    return entry | ({"url": address_of(entry["asset_id"])} if released else {})


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)

"""How a job ends: all that the transaction that makes it terminal writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calotype.serving.core.errors import Cancelled, DeadlineExceeded, EngineError
from calotype.serving.core.request import ImageSize
from calotype.serving.jobs.lifecycle import Status
from calotype.serving.jobs.records import AssetRecord, HeldRecord, JobRecord, new_id
from calotype.serving.jobs.result import BlockedImage, GenerationResult, blocked_error, held_error


@dataclass(frozen=True, slots=True)
class Ending:
    """What `Jobs.finish_job` writes."""

    status: Status
    fence: int | None = None
    """Only the holder of this lease may end the job so; None = whoever comes first."""
    error: dict[str, Any] | None = None
    output: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    stored: Sequence[AssetRecord] = ()
    held: Sequence[HeldRecord] = ()


def canceled_ending() -> Ending:
    return Ending("canceled", error=Cancelled("The job was canceled.").to_payload())


def late_ending() -> Ending:
    error = DeadlineExceeded("The job was not finished within the time allowed for it.")
    return Ending("failed", error=error.to_payload())


def poison_ending(job: JobRecord) -> Ending:
    """Workers die over this job, so it is not given to another one."""
    error = EngineError(
        f"The job was given up: the workers that ran it died, {job.attempts} of them. "
        "Other requests are not affected; please report this one.",
        details={"reason": "worker_died", "attempts": job.attempts},
    )
    return Ending("failed", error=error.to_payload())


def drawn_ending(job: JobRecord, result: GenerationResult) -> Ending:
    """At least one picture may be seen."""
    now, held = job.started or job.created, _held(job, result)
    return Ending(
        "succeeded",
        output={
            "images": result.to_payload()["images"],
            "blocked": result.to_payload()["blocked"],
        },
        moderation=_moderation(job, result, held),
        held=held,
        usage=result.usage,
        metrics=_metrics(job, result),
        stored=[
            AssetRecord(
                id=image.asset_id,
                job_id=job.id,
                team_id=job.team_id,
                blob_key=image.blob_key,
                content_type=image.content_type,
                width=image.width,
                height=image.height,
                seed=image.seed,
                sha256=image.sha256,
                created=now,
                expires=job.expires,
            )
            for image in result.images
        ],
    )


def blocked_ending(job: JobRecord, result: GenerationResult) -> Ending:
    """The safety stage refused every picture, or holds them for a person."""
    held = _held(job, result)
    if held:
        moderation = _moderation(job, result, held)
        waiting = held_error(moderation["held"], str(job.input.get("request_id", job.id)))
        return Ending(
            "failed",
            error=waiting.to_payload(),
            moderation=moderation,
            metrics=_metrics(job, result),
            held=held,
        )
    first = result.blocked[0] if result.blocked else BlockedImage(0, [])
    error = blocked_error(
        "output",
        [name for image in result.blocked for name in image.categories],
        str(job.input.get("request_id", job.id)),
        decision_id=first.decision_id,
        policy=first.policy,
    )
    return Ending(
        "failed",
        error=error.to_payload(),
        moderation=_moderation(job, result),
        metrics=_metrics(job, result),
    )


def _moderation(
    job: JobRecord, result: GenerationResult, held: Sequence[HeldRecord] = ()
) -> dict[str, Any]:
    found = {**(job.moderation or {}), "output": result.decisions}
    if result.prompt_decision is not None:
        found["input"] = result.prompt_decision
    if held:
        found["held"] = [
            {
                "index": picture.position,
                "case_id": picture.case_id,
                "asset_id": picture.asset_id,
                "categories": image.categories,
                "status": "held",
            }
            for picture, image in zip(held, result.held, strict=True)
        ]
    return found


def _held(job: JobRecord, result: GenerationResult) -> list[HeldRecord]:
    """The pictures that wait for a person; `Database.finish_job` says since when."""
    return [
        HeldRecord(
            asset_id=image.asset_id,
            case_id=new_id("case"),
            job_id=job.id,
            team_id=job.team_id,
            position=image.index,
            blob_key=image.blob_key,
            seal=str(job.input["seal"]),
            content_type=image.content_type,
            width=image.width,
            height=image.height,
            seed=image.seed,
            sha256=image.sha256,
            created=0.0,
            expires=0.0,
        )
        for image in result.held
    ]


def _metrics(job: JobRecord, result: GenerationResult) -> dict[str, Any]:
    request = job.request
    size, n = ImageSize.parse(str(request["size"])), int(request["n"])
    waited = (job.started or job.created) - job.created
    return {
        "queue_ms": round(1000 * max(0.0, waited)),
        "megapixels": round(size.pixels * n / 1e6, 3),
        "steps": request["steps"],
        "rendered_size": request["rendered_size"],
        **result.metrics,
    }

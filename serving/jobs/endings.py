"""How a job ends: all that the transaction that makes it terminal writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calotype.serving.core.errors import (
    CalotypeError,
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    PermissionDenied,
)
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import ImageSize
from calotype.serving.jobs.lifecycle import Status
from calotype.serving.jobs.moderation_record import HeldEntry, ModerationRecord
from calotype.serving.jobs.records import AssetRecord, HeldRecord, JobRecord, new_id
from calotype.serving.jobs.refusals import blocked_error, held_error
from calotype.serving.jobs.result import (
    CONTENT_TYPES,
    BlockedImage,
    GenerationResult,
    JobMetrics,
    JobOutput,
    TokenUsage,
)


@dataclass(frozen=True, slots=True)
class Ending:
    """What `Jobs.finish_job` writes; a column stays as it is where its part is None."""

    status: Status
    fence: int | None = None
    """Only the generator with this lease may end the job so; None = whoever comes first."""
    error: CalotypeError | None = None
    output: JobOutput | None = None
    moderation: ModerationRecord | None = None
    usage: TokenUsage | None = None
    metrics: JobMetrics | None = None
    stored: Sequence[AssetRecord] = ()
    held: Sequence[HeldRecord] = ()

    @property
    def newest_takedown(self) -> int | None:
        """The newest takedown that all decisions about its images knew; None = not told."""
        decisions = () if self.moderation is None else self.moderation.output
        known = [n for n in (found.newest_takedown for found in decisions) if n is not None]
        return min(known, default=None)

    @property
    def shown_as_drawn(self) -> frozenset[int]:
        """The images that clients see as they were drawn, neither blurred nor held nor refused."""
        if self.output is None:
            return frozenset()
        decisions = () if self.moderation is None else self.moderation.output
        blurred = {index for index, found in enumerate(decisions) if found.verdict == "BLUR"}
        return frozenset(image.index for image in self.output.images) - blurred

    def columns(self) -> JsonObject:
        """The JSON columns that it sets."""
        parts = {
            "error": self.error,
            "output": self.output,
            "moderation": self.moderation,
            "usage": self.usage,
            "metrics": self.metrics,
        }
        return {name: part.to_payload() for name, part in parts.items() if part is not None}


def canceled_ending() -> Ending:
    return Ending("canceled", error=Cancelled("The job was canceled."))


def late_ending() -> Ending:
    error = DeadlineExceeded("The job was not finished within the time allowed for it.")
    return Ending("failed", error=error)


def source_gone_ending() -> Ending:
    """A picture that the job is drawn from was taken down."""
    error = InvalidRequest(
        "A picture that the request is drawn from was taken down; nothing is drawn from it.",
        code="picture_taken_down",
        param="image",
    )
    return Ending("failed", error=error)


def rights_revoked_ending() -> Ending:
    """Somebody took back the consent to learn from a picture that an adapter learnt from."""
    error = PermissionDenied(
        "An adapter of the request learnt from a picture whose rights were revoked; nothing is "
        "drawn with it.",
        code="rights_revoked",
        param="loras",
    )
    return Ending("failed", error=error)


def poison_ending(job: JobRecord) -> Ending:
    """Workers die over this job, so it is not given to another one."""
    error = EngineError(
        f"The job was given up: the workers that ran it died, {job.attempts} of them. "
        "Other requests are not affected; please report this one.",
        details={"reason": "worker_died", "attempts": job.attempts},
    )
    return Ending("failed", error=error)


def drawn_ending(job: JobRecord, result: GenerationResult) -> Ending:
    """At least one image may be seen."""
    now, held = job.started or job.created, _held(job, result)
    return Ending(
        "succeeded",
        output=JobOutput(result.images, result.blocked, result.maps),
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
        ]
        + [
            AssetRecord(
                id=one.asset_id,
                job_id=job.id,
                team_id=job.team_id,
                blob_key=one.blob_key,
                content_type=CONTENT_TYPES["png"],
                width=one.width,
                height=one.height,
                seed=0,
                sha256=one.sha256,
                created=now,
                expires=job.expires,
            )
            for one in result.maps
        ],
    )


def blocked_ending(job: JobRecord, result: GenerationResult) -> Ending:
    """The safety stage refused every image, or holds them for a reviewer."""
    held = _held(job, result)
    moderation = _moderation(job, result, held)
    if held:
        error = held_error(moderation.held, job.options.request_id)
    else:
        first = result.blocked[0] if result.blocked else BlockedImage(0, [])
        error = blocked_error(
            "output",
            [name for image in result.blocked for name in image.categories],
            job.options.request_id,
            decision_id=first.decision_id,
            policy=first.policy,
        )
    return Ending(
        "failed", error=error, moderation=moderation, metrics=_metrics(job, result), held=held
    )


def _moderation(
    job: JobRecord, result: GenerationResult, held: Sequence[HeldRecord]
) -> ModerationRecord:
    before = ModerationRecord.from_payload(job.moderation)
    return replace(
        before,
        input=result.prompt_decision or before.input,
        output=tuple(result.decisions),
        held=tuple(
            HeldEntry(row.position, row.case_id, row.asset_id, tuple(image.categories))
            for row, image in zip(held, result.held, strict=True)
        ),
    )


def _held(job: JobRecord, result: GenerationResult) -> list[HeldRecord]:
    """The images that wait for a person; `Database.finish_job` says since when."""
    return [
        HeldRecord(
            asset_id=image.asset_id,
            case_id=new_id("case"),
            job_id=job.id,
            team_id=job.team_id,
            position=image.index,
            blob_key=image.blob_key,
            seal=image.seal,
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


def _metrics(job: JobRecord, result: GenerationResult) -> JobMetrics:
    """What the worker measured, completed from the job."""
    request, found = job.request, result.metrics
    pixels = ImageSize.parse(str(request["size"])).pixels * int(request["n"])
    waited = (job.started or job.created) - job.created
    return replace(
        found,
        queue_ms=round(1000 * max(0.0, waited)),
        megapixels=round(pixels / 1e6, 3) if found.megapixels is None else found.megapixels,
        steps=int(request["steps"]) if found.steps is None else found.steps,
        rendered_size=found.rendered_size or str(request["rendered_size"]),
    )

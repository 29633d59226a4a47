"""The right to run a job, as a generator gets it, and what it reports while it runs.

As payloads they pass between dispatcher and generators; unknown fields are ignored, a higher
version is refused (`core.payloads`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from calotype.serving.core.decision import PolicyVersion
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import check_version, known_fields
from calotype.serving.core.request import GenerationRequest
from calotype.serving.jobs.moderation_record import ModerationRecord
from calotype.serving.jobs.options import JobOptions
from calotype.serving.jobs.recipe import image_recipe
from calotype.serving.jobs.records import Checkpoint, JobRecord

LEASE_VERSION = 1


@dataclass(frozen=True, slots=True)
class LeaseProgress:
    """How far a leased job is: a part of a heartbeat."""

    fence: int
    step: int
    steps: int
    gpu_seconds: float = 0.0
    """Measured device time so far, of all devices together."""

    @property
    def share(self) -> float:
        """Of the steps, 0 to 1."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    def to_payload(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: JsonObject) -> LeaseProgress:
        return cls(**known_fields(cls, payload))


@dataclass(frozen=True, slots=True)
class Lease:
    """What a generator gets."""

    job_id: str
    fence: int
    """Names this lease; every later message about the job must carry it."""
    request: GenerationRequest
    options: JobOptions
    team_id: str
    expires: float
    """Seconds since the epoch; a heartbeat moves it."""
    recipe: JsonObject | None = None
    """What the files carry (`file_recipe`)."""
    checkpoint: Checkpoint | None = None
    """Where an earlier lease got to; None = draw from the beginning."""
    prompt_policy: PolicyVersion | None = None
    """What the prompt was checked by."""
    review_categories: tuple[str, ...] | None = None
    """The categories for which the prompt makes every image wait for a reviewer; None = none."""

    @classmethod
    def from_job(
        cls, job: JobRecord, expires: float, checkpoint: Checkpoint | None = None
    ) -> Lease:
        checked = ModerationRecord.from_payload(job.moderation).input
        return cls(
            job.id,
            job.fence,
            GenerationRequest.from_payload(job.request),
            job.options,
            job.team_id,
            expires,
            job.recipe,
            checkpoint,
            None if checked is None else checked.version,
            None if checked is None else checked.review_categories,
        )

    def file_recipe(self, index: int) -> JsonObject | None:
        """The recipe that the file of image ``index`` carries; see `recipe_metadata`."""
        if self.recipe is None:
            return None
        return image_recipe(self.recipe, index, self.options.prompt_in_files)

    def to_payload(self) -> JsonObject:
        held = self.review_categories
        return {
            "version": LEASE_VERSION,
            "job_id": self.job_id,
            "fence": self.fence,
            "request": self.request.to_payload(),
            "options": self.options.to_payload(),
            "team_id": self.team_id,
            "expires": self.expires,
            "recipe": self.recipe,
            "checkpoint": self.checkpoint and self.checkpoint.to_payload(),
            "prompt_policy": None if self.prompt_policy is None else asdict(self.prompt_policy),
            "review_categories": None if held is None else list(held),
        }

    @classmethod
    def from_payload(cls, payload: JsonObject) -> Lease:
        """Raises EngineError for a higher version."""
        check_version(payload, LEASE_VERSION, "A lease")
        found = known_fields(cls, payload)
        left, policy, held = (
            found.get(name) for name in ("checkpoint", "prompt_policy", "review_categories")
        )
        return cls(
            **found
            | {
                "request": GenerationRequest.from_payload(found["request"]),
                "options": JobOptions.from_payload(found["options"], found["job_id"]),
                "checkpoint": left and Checkpoint.from_payload(left),
                "prompt_policy": policy and PolicyVersion(**known_fields(PolicyVersion, policy)),
                "review_categories": None if held is None else tuple(held),
            }
        )

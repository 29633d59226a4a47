"""What the service answers, as frozen values; fields of a newer service are kept in ``raw``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

JsonObject = dict[str, Any]
"""As the service answered it. The client imports nothing of the service, also not its alias."""

TERMINAL = frozenset({"succeeded", "failed", "canceled"})


@dataclass(frozen=True, slots=True)
class Image:
    """One finished picture."""

    asset_id: str
    url: str
    """Signed; whoever knows it may open it for a while."""
    index: int
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    flagged: bool

    @classmethod
    def of(cls, raw: JsonObject) -> Image:
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was when it was asked for."""

    id: str
    status: str
    """``queued running succeeded failed canceled``."""
    model: str
    progress: int
    """Whole percent."""
    queue_position: int | None
    estimated_seconds: float | None
    created_at: int
    images: list[Image]
    error: JsonObject | None
    metadata: dict[str, str]
    recipe_hash: str | None
    raw: JsonObject = field(repr=False)

    @property
    def over(self) -> bool:
        return self.status in TERMINAL

    @classmethod
    def of(cls, raw: JsonObject) -> Job:
        output = raw.get("output") or {}
        return cls(
            id=raw["id"],
            status=raw["status"],
            model=raw["model"],
            progress=raw["progress"],
            queue_position=raw.get("queue_position"),
            estimated_seconds=raw.get("estimated_seconds"),
            created_at=raw["created_at"],
            images=[Image.of(image) for image in output.get("images", [])],
            error=raw.get("error"),
            metadata=dict(raw.get("metadata") or {}),
            recipe_hash=raw.get("recipe_hash"),
            raw=dict(raw),
        )


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some of the team's jobs, newest first."""

    jobs: list[Job]
    has_more: bool
    last_id: str | None
    """``after`` of the next page."""

    @classmethod
    def of(cls, raw: JsonObject) -> JobPage:
        return cls([Job.of(job) for job in raw["data"]], raw["has_more"], raw["last_id"])


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job."""

    id: int
    type: str
    """``job.queued started progress partial_image succeeded failed canceled``."""
    data: JsonObject

    @property
    def terminal(self) -> bool:
        return self.type.removeprefix("job.") in TERMINAL

    @property
    def job(self) -> Job | None:
        """The whole job, with the last event."""
        return Job.of(self.data) if self.terminal else None

"""Rows of the job database as frozen values."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from calotype.serving.jobs.lifecycle import TERMINAL, Status


def new_id(kind: str) -> str:
    """A fresh identifier such as ``job_5f0c...``; 96 random bits."""
    return f"{kind}_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class TeamRecord:
    id: str
    name: str
    weight: float
    """Share of the machines under load, relative to the other teams."""
    created: float


@dataclass(frozen=True, slots=True)
class KeyRecord:
    id: str
    team_id: str
    name: str
    prefix: str
    """First characters of the key, enough to tell it from others."""
    digest: str
    scopes: list[str]
    created: float
    revoked: float | None = None


@dataclass(frozen=True, slots=True)
class NewJob:
    """What the gateway knows of a job before it exists."""

    id: str
    team_id: str
    model: str
    input: dict[str, Any]
    """What was asked, after defaults; also how the picture is encoded and answered."""
    request: dict[str, Any]
    """`GenerationRequest.to_payload`: what is drawn."""
    api_key_id: str | None = None
    type: str = "image.generate"
    metadata: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    deadline: float | None = None
    expires: float | None = None
    body_sha256: str | None = None
    idempotency: str | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    id: str
    team_id: str
    api_key_id: str | None
    type: str
    model: str
    status: Status
    input: dict[str, Any]
    request: dict[str, Any]
    metadata: dict[str, str]
    priority: int
    fence: int
    """Grows with every lease and every loss of one; a writer with an older fence is refused."""
    attempts: int
    step: int
    steps: int
    created: float
    started: float | None
    completed: float | None
    deadline: float | None
    expires: float | None
    lease_replica: str | None
    lease_expires: float | None
    error: dict[str, Any] | None
    output: dict[str, Any] | None
    moderation: dict[str, Any] | None
    usage: dict[str, Any] | None
    metrics: dict[str, Any] | None
    body_sha256: str | None
    idempotency: str | None

    @property
    def over(self) -> bool:
        return self.status in TERMINAL

    @property
    def progress(self) -> int:
        """Whole percent."""
        if self.status == "succeeded":
            return 100
        return min(99, 100 * self.step // self.steps) if self.steps else 0


@dataclass(frozen=True, slots=True)
class AssetRecord:
    id: str
    job_id: str
    team_id: str
    blob_key: str
    content_type: str
    width: int
    height: int
    seed: int
    sha256: str
    created: float
    expires: float | None

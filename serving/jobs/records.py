"""Rows of the job database as frozen values."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, field

from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import known_fields
from calotype.serving.jobs.lifecycle import TERMINAL, Status
from calotype.serving.jobs.options import JobOptions


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
    requests_per_minute: int | None = None
    concurrent_jobs: int | None = None
    """Most jobs that may be open (queued or running) at once."""
    gpu_seconds_per_day: float | None = None
    budget_per_month: float | None = None
    """In the currency of the service's price of a GPU-second."""
    allowed_models: list[str] | None = None
    """Names of models; None = all."""
    policy: str | None = None
    prompt_in_files: bool = False
    """Whether image files carry the prompt that they were made with."""
    bucket_tokens: float | None = None
    bucket_time: float | None = None
    namespace: str | None = None
    """With ``uid``, the Team object that it belongs to; None = an administrator made it."""
    uid: str | None = None
    webhook_secret: str | None = None


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
    expires: float | None = None
    """The old key of a rotation works until then."""
    declared: bool = False
    """It comes from a manifest."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """What the gateway knows of a job before it exists."""

    id: str
    team_id: str
    model: str
    input: JsonObject
    """What was asked, after defaults; also how the image is encoded and answered."""
    request: JsonObject
    """`GenerationRequest.to_payload`: what is drawn."""
    api_key_id: str | None = None
    type: str = "image.generate"
    metadata: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    deadline: float | None = None
    expires: float | None = None
    body_sha256: str | None = None
    idempotency: str | None = None
    recipe: JsonObject | None = None
    recipe_hash: str | None = None
    reserved_seconds: float = 0.0
    """Predicted device seconds, reserved in the team's quota until the job is over."""
    price: float = 0.0
    """What a device second of it costs."""
    promised: float | None = None
    """When it shall be over at the latest."""
    webhook: JsonObject | None = None
    batch_id: str | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    id: str
    team_id: str
    api_key_id: str | None
    type: str
    model: str
    status: Status
    input: JsonObject
    request: JsonObject
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
    error: JsonObject | None
    """`CalotypeError.to_payload`."""
    output: JsonObject | None
    """`result.JobOutput.to_payload`."""
    moderation: JsonObject | None
    """`ModerationRecord.to_payload`."""
    usage: JsonObject | None
    """`result.TokenUsage.to_payload`."""
    metrics: JsonObject | None
    """`result.JobMetrics.to_payload`."""
    outage: JsonObject | None
    """`Outage.to_payload`."""
    gpu_seconds: float
    """Device time that was measured while it ran, as its last lease told."""
    body_sha256: str | None
    idempotency: str | None
    recipe: JsonObject | None
    recipe_hash: str | None
    reserved_seconds: float
    reserved_day: str | None
    price: float
    promised: float | None
    webhook: JsonObject | None
    batch_id: str | None
    purged: float | None

    @property
    def options(self) -> JobOptions:
        return JobOptions.from_payload(self.input, self.id)

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


@dataclass(frozen=True, slots=True)
class FileRecord:
    """An uploaded file, or one that a batch wrote."""

    id: str
    team_id: str
    purpose: str
    filename: str
    content_type: str
    size: int
    sha256: str
    blob_key: str
    created: float
    expires: float | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a job can go on after its generator died."""

    job_id: str
    fence: int
    """Of the lease that wrote it."""
    step: int
    blob_key: str

    def to_payload(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: JsonObject) -> Checkpoint:
        """Unknown fields are ignored."""
        return cls(**known_fields(cls, payload))


@dataclass(frozen=True, slots=True)
class PreviewRecord:
    """A decoded estimate of a image that is being drawn."""

    job_id: str
    image_index: int
    partial_index: int
    """Counts the previews of one image from 0."""
    fence: int
    step: int
    blob_key: str
    content_type: str

    def to_payload(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: JsonObject) -> PreviewRecord:
        """Unknown fields are ignored."""
        return cls(**known_fields(cls, payload))


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """Where a team wants to be told of its jobs."""

    id: str
    team_id: str
    name: str
    url: str
    event_types: list[str]
    secret: str = field(repr=False)
    old_secret: str | None = field(repr=False)
    old_secret_expires: float | None
    disabled: float | None
    disabled_reason: str | None
    created: float
    updated: float


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """One event on its way to one address."""

    id: str
    """The ``webhook-id``: the same on every attempt."""
    team_id: str
    endpoint_id: str | None
    """None: the job's own webhook."""
    job_id: str | None
    event_type: str
    url: str
    body: str | None
    status: str
    """``pending``, ``delivered`` or ``failed``."""
    attempts: int
    due: float | None
    created: float
    completed: float | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    delivery_id: str
    number: int
    time: float
    seconds: float
    http_status: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """Many requests that were sent as one file."""

    id: str
    team_id: str
    api_key_id: str
    endpoint: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    status: str
    """OpenAI's: ``in_progress cancelling`` and the ends ``completed failed cancelled expired``."""
    metadata: dict[str, str]
    errors: list[JsonObject] | None
    created: float
    moments: dict[str, float]
    """State -> when it was entered."""
    deadline: float
    claimed_until: float | None = None


@dataclass(frozen=True, slots=True)
class BatchLine:
    batch_id: str
    line: int
    custom_id: str
    body: JsonObject
    job_id: str | None = None
    answer: JsonObject | None = None
    """``status_code``, and ``body`` where it is not the job's own answer."""


@dataclass(frozen=True, slots=True)
class HeldRecord:
    """A row of the table ``held_pictures``."""

    asset_id: str
    case_id: str
    job_id: str
    team_id: str
    position: int
    blob_key: str
    seal: str = field(repr=False)
    content_type: str
    width: int
    height: int
    seed: int
    sha256: str
    created: float
    expires: float

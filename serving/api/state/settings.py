"""What an operator may set about the gateway."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calotype.serving.config import describe
from calotype.serving.core.errors import InvalidRequest

SETTING = "CALOTYPE_GATEWAY_"
"""``CALOTYPE_GATEWAY_PUBLIC_URL`` and so on: one variable for each of `GatewaySettings`."""

FEATURES = (
    "edits",
    "references",
    "variations",
    "negative_prompt",
    "sigmas",
    "samplers",
    "previews",
    "controlnets",
)
"""What workers may or may not be able to do beside drawing from a prompt."""


class GatewaySettings(BaseModel):
    """Settings of `calotype.serving.api.app.create_app`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    public_url: str | None = Field(
        None, description="Address that clients use, for signed URLs; None = from the request."
    )
    request_timeout: float = Field(
        285.0,
        gt=0,
        description="Seconds a synchronous request may take; Node's fetch gives up after 300.",
    )
    job_deadline: float = Field(
        3600.0, gt=0, description="Seconds after which a job of POST /v1/jobs fails; its default."
    )
    max_outage_seconds: float = Field(
        900.0,
        ge=0,
        description="Seconds for which a job waits for a part that is away (the text encoder, the "
        "safety stage, the object store); synchronous ones as well, when nobody waits any more.",
    )
    outage_patience_seconds: float = Field(
        60.0,
        ge=0,
        description="Seconds for which a synchronous request waits for a job that waits for such a "
        "part; then it is told so, and the job goes on without it.",
    )
    max_queue: int = Field(
        1000,
        ge=1,
        description="Open jobs of one model above which only teams that have less than their share "
        "of it may add some.",
    )
    hangup_grace: float = Field(
        15.0, ge=0, description="Seconds a job goes on after its client hung up."
    )
    wait_slice: float = Field(
        10.0, gt=0, description="Seconds of one wait at the backend before the database is asked."
    )
    max_body_bytes: int = Field(
        32 * 1024 * 1024,
        ge=1024,
        description="Largest JSON body that may hold pictures; others have at most a megabyte.",
    )
    memory_bytes: int = Field(
        768 * 1024 * 1024,
        ge=96 * 1024 * 1024,
        description="Memory for large bodies and decoded pictures, all requests together; a "
        "process needs about 200 MB beside it.",
    )
    asset_seconds: float = Field(
        24 * 3600.0, gt=0, description="Seconds for which pictures are kept."
    )
    file_seconds: float = Field(
        30 * 86_400.0,
        gt=0,
        description="Seconds for which an uploaded file is kept that names no expiry.",
    )
    team_file_bytes: int = Field(
        20 * 1024**3, ge=0, description="Bytes of all files of one team, pictures of jobs included."
    )
    url_seconds: int = Field(3600, ge=1, description="Seconds for which a signed URL is valid.")
    attach_retries: bool = Field(
        True, description="An SDK's retry without Idempotency-Key joins the job it repeats."
    )
    features: frozenset[str] = Field(
        frozenset(FEATURES),
        description="What the workers can do beside drawing; a subset of FEATURES.",
    )
    team_requests_per_second: float = Field(
        200.0,
        gt=0,
        description="Requests of one team that a gateway answers in a second, of any kind; ten "
        "seconds' worth of them may come at once.",
    )
    connections_per_address: int = Field(
        1024,
        ge=1,
        description="Open connections of one client address; behind a proxy all come from its own.",
    )
    max_upload_bytes: int = Field(
        128 * 1024 * 1024, ge=1024, description="Largest multipart body; one file may have 50 MB."
    )
    max_json_upload_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1024,
        description="Largest JSON body of an edit, with its pictures in it as base64.",
    )
    body_seconds: float = Field(
        60.0, gt=0, description="Seconds in which a request's body must arrive."
    )
    forecast_seconds: float = Field(
        0.5, ge=0, description="Seconds for which a forecast of the queue is used again."
    )
    watch_seconds: float = Field(
        0.5, gt=0, description="Pause between looks at the jobs of open event streams."
    )
    keep_alive_seconds: float = Field(
        15.0, gt=0, description="An idle event stream says something after so long."
    )
    gpu_second_price: float = Field(
        0.0, ge=0, description="What a GPU-second costs, for budgets and the usage report."
    )
    sweep_seconds: float | None = Field(
        60.0, gt=0, description="Pause between removals of what has expired; None = never here."
    )
    tombstone_seconds: float = Field(
        30 * 86_400.0, ge=0, description="How long an expired job is remembered as expired."
    )
    garbage_seconds: float = Field(
        3600.0, ge=0, description="How long a file that nobody names is kept all the same."
    )
    webhook_seconds: float | None = Field(
        1.0, gt=0, description="Pause between looks for webhooks to send; None = never here."
    )
    batch_seconds: float | None = Field(
        1.0, gt=0, description="Pause between looks at batches; None = never here."
    )
    dataset_seconds: float | None = Field(
        1.0, gt=0, description="Pause between looks for data sets to check; None = never here."
    )
    audit_seconds: float | None = Field(
        10.0, gt=0, description="Pause between signatures of audit logs; None = never here."
    )
    outbound_networks: tuple[str, ...] = Field(
        (), description="Private networks that webhooks and image URLs may lead to."
    )
    outbound_http: bool = Field(False, description="Allow plain http for webhooks and images.")
    cors_origins: tuple[str, ...] = Field(
        (),
        description="Web pages that may call the API from a browser, such as "
        "https://app.example; '*' = all of them.",
    )
    fetch_seconds: float = Field(20.0, gt=0, description="Seconds to download an image by URL.")
    data_dir: pathlib.Path | None = Field(
        None,
        description="Folder with the keys that watermarks are read and audit logs are signed with; "
        "None = as the environment says (CALOTYPE_PROVENANCE_DIR, CALOTYPE_DATA_DIR, "
        "CALOTYPE_INTERNAL_TOKEN, CALOTYPE_AUDIT_KEY).",
    )


def read_settings(variables: Mapping[str, str] = os.environ) -> GatewaySettings:
    """The gateway's settings from the environment; lists are JSON.

    Raises:
        InvalidRequest: a variable names no setting, or its value is not possible.
    """
    given: dict[str, Any] = {}
    for variable, text in variables.items():
        if variable.startswith(SETTING):
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            given[variable.removeprefix(SETTING).lower()] = value
    try:
        return GatewaySettings.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(f"{SETTING}*, in small letters: {describe(error)}") from None

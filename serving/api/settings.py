"""What an operator may set about the gateway."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


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
    hangup_grace: float = Field(
        15.0, ge=0, description="Seconds a job goes on after its client hung up."
    )
    wait_slice: float = Field(
        10.0, gt=0, description="Seconds of one wait at the backend before the store is asked."
    )
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024, description="Largest request body.")
    asset_seconds: float = Field(
        24 * 3600.0, gt=0, description="Seconds for which pictures are kept."
    )
    url_seconds: int = Field(3600, ge=1, description="Seconds for which a signed URL is valid.")
    attach_retries: bool = Field(
        True, description="An SDK's retry without Idempotency-Key joins the job it repeats."
    )
    set_request_id: bool = Field(
        True, description="Off behind Ray Serve's HTTP proxy, which sets x-request-id itself."
    )

"""The answer of ``GET /internal/v1/status``: how a model app and its replicas are.

The model app writes it, the operator and the gateways read it. Fields that this version does not
know are kept and have no effect; an answer of a higher version is refused (`wire.document`).
"""

from __future__ import annotations

from pydantic import Field

from calotype.serving.wire.document import Document, JsonObject, Part


class AdapterState(Part):
    """What one replica says of one adapter."""

    state: str = Field("missing", description="loading, ready or failed; missing = not known yet.")
    revision: str | None = Field(None, description="The one that is wanted.")
    serving_revision: str | None = Field(
        None, description="The one that requests get; None while there is none."
    )
    message: str = Field("", description="Why it failed.")
    load_milliseconds: float | None = Field(None, description="How long the load took.")


class ReplicaState(Part):
    """What one generator says of itself."""

    replica: str = Field("", description="Name of the Serve replica.")
    node: str | None = None
    ready: bool = False
    message: str = Field("", description="What keeps it from drawing.")
    config_hash: str = Field("", description="`config_hash` of the ``user_config`` that it has.")
    engine: JsonObject | None = Field(None, description="How it draws; None while it loads.")
    adapters: dict[str, AdapterState] = Field(default_factory=dict)


class ModelAppStatus(Document):
    """The whole answer."""

    name: str = Field("", description="Name of the ImageModel.")
    ready: bool = False
    replicas: int = Field(0, description="Generators that draw.")
    queue_seconds: float = Field(
        0.0, ge=0, description="Predicted work of queued and running jobs."
    )
    config_hash: str = Field(
        "", description="The one that all generators have; empty while they differ."
    )
    message: str = Field("", description="The first thing that is wrong.")
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="Adapter -> ``loading``, ``ready`` or why it failed, over all replicas.",
    )
    replica_states: tuple[ReplicaState, ...] = ()

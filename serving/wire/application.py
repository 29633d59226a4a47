"""The ``user_config`` of each deployment of a model app: what a manifest says, told to replicas.

The operator writes them into serveConfigV2 or model.json, `deployments.app` where there is no
cluster; Ray Serve hands each to its replicas. Fields that this version does not know are kept and
have no effect; a configuration of a higher version is refused (`wire.document`).
"""

from __future__ import annotations

from pydantic import Field

from calotype.serving.wire.document import (
    AdapterManifest,
    Document,
    JsonObject,
    ModelManifest,
    Part,
)


class DispatcherConfig(Document):
    """Of the Dispatcher: which model it is of, for its whole life."""

    model: str
    max_outage_seconds: float = Field(
        900.0, ge=0, description="How long a job waits for a part that is away before it fails."
    )


class NamedPolicy(Part):
    """A ModerationPolicy."""

    name: str
    spec: JsonObject


class ModeratorConfig(Document):
    """Of the Moderator."""

    policy: NamedPolicy | None = Field(None, description="The model's; None = the package's.")
    policies: dict[str, JsonObject] = Field(
        default_factory=dict, description="Name -> spec of those that teams and adapters name."
    )


class TextEncoderConfig(Document):
    """Of the TextEncoder."""

    model: ModelManifest


class GeneratorConfig(Document):
    """Of the Generator."""

    model: ModelManifest
    adapters: list[AdapterManifest] = Field(default_factory=list)

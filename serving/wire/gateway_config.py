"""gateway.json: what the gateways of a cluster know of models and adapters.

The operator writes it into a ConfigMap that is mounted into the gateways' pods; teams are in an
object of their own (`gateway_teams`). Fields that this version does not know are kept and have no
effect, and a file of a higher version is refused (`wire.document`); what is inside a manifest is
checked strictly.
"""

from __future__ import annotations

from pydantic import Field

from calotype.serving.wire.document import AdapterManifest, Document, ModelManifest, Part


class ServedModel(Part):
    """A model and the app that draws it."""

    manifest: ModelManifest
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="Base URL of its model app; null where it has none, or none yet.",
    )
    ready: bool = Field(False, description="What the operator last saw; the gateway asks itself.")


class GatewayConfig(Document):
    """The whole file."""

    models: list[ServedModel] = Field(default_factory=list)
    default_model: str | None = Field(
        None, description="Model of requests that name none; null = they must name one."
    )
    adapters: list[AdapterManifest] = Field(default_factory=list)

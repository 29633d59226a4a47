"""gateway.json: what the gateways of a cluster know of models, adapters, policies and teams.

The operator writes it into a ConfigMap that is mounted into the gateways' pods. Fields that this
version does not know are kept and have no effect, and a file of a higher version is refused
(`wire.document`); what is inside a manifest is checked strictly.
"""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

from pydantic import Field, ValidationError

from calotype.serving.config import Quotas, describe
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.wire.document import (
    AdapterManifest,
    Document,
    JsonObject,
    ModelManifest,
    Part,
)

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ServedModel(Part):
    """A model and the app that draws it."""

    manifest: ModelManifest
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="Base URL of its model app; null for a provider's model, which has none.",
    )
    ready: bool = Field(False, description="What the operator last saw; the gateway asks itself.")


class DeclaredTeam(Part):
    """A Team and the digests of its API keys."""

    name: str = Field(min_length=1, max_length=255)
    namespace: str = "default"
    display_name: str = ""
    weight: float = Field(1.0, gt=0)
    quotas: Quotas = Field(default_factory=Quotas)
    models: list[str] = Field(default_factory=list, description="Allowed models; empty = all.")
    moderation_policy: str | None = Field(
        None, description="Of policies: the one by which its requests are judged too."
    )
    refusal: str | None = Field(None, description="Why the team may not draw; None = it may.")
    key_hashes: list[Digest] = Field(
        default_factory=list, description="sha256 of each API key, in hex."
    )


class GatewayConfig(Document):
    """The whole file."""

    models: list[ServedModel] = Field(default_factory=list)
    adapters: list[AdapterManifest] = Field(default_factory=list)
    policies: dict[str, JsonObject] = Field(
        default_factory=dict, description="Name -> spec of a ModerationPolicy."
    )
    teams: list[DeclaredTeam] = Field(default_factory=list)


def parse_gateway_config(raw: bytes, path: pathlib.Path) -> GatewayConfig:
    """Reads the file's content.

    Raises:
        InvalidRequest: it is no JSON, or says what no manifest may say; names file and field.
    """
    try:
        content = json.loads(raw.decode("utf-8") or "{}")
    except ValueError as error:
        raise InvalidRequest(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} must hold a JSON object.")
    try:
        return GatewayConfig.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {describe(error)}") from None

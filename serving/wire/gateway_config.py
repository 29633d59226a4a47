"""What the operator tells the gateways of a cluster: models and where they run, adapters, teams.

The file is a ConfigMap that is mounted into the gateways' pods. Fields that a newer operator writes
and this gateway does not know are ignored; what is inside a manifest is checked strictly.
"""

from __future__ import annotations

import json
import pathlib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from calotype.serving.config import ImageModel, LoRAAdapter, describe
from calotype.serving.core.errors import InvalidRequest

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True
    )


class ServedModel(_Part):
    """A model and the app that draws it."""

    manifest: ImageModel
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="Base URL of its model app; null for a provider's model, which has none.",
    )
    ready: bool = Field(False, description="What the operator last saw; the gateway asks itself.")


class DeclaredTeam(_Part):
    """A Team and the digests of its API keys."""

    name: str = Field(min_length=1, max_length=255)
    namespace: str = "default"
    display_name: str = ""
    weight: float = Field(1.0, gt=0)
    quotas: dict[str, Any] = Field(default_factory=dict)
    models: list[str] = Field(default_factory=list, description="Allowed models; empty = all.")
    moderation_policy: str | None = Field(
        None, description="Of policies: the one by which its requests are judged too."
    )
    refusal: str = Field("", description="Why the team may not draw; empty = it may.")
    key_hashes: list[Digest] = Field(
        default_factory=list, description="sha256 of each API key, in hex."
    )


class GatewayConfig(_Part):
    """gateway.json."""

    models: list[ServedModel] = Field(default_factory=list)
    adapters: list[LoRAAdapter] = Field(default_factory=list)
    policies: dict[str, dict[str, Any]] = Field(default_factory=dict)
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

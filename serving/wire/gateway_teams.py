"""teams.json: what the gateways of a cluster know of teams and their API keys.

The operator writes it into a ConfigMap of its own, so that a key is taken back also while a
configuration of models is too large to be written, or says what cannot be used.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from calotype.serving.config import Quotas
from calotype.serving.wire.document import Document, Part

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DeclaredTeam(Part):
    """A Team and the digests of its API keys."""

    name: str = Field(min_length=1, max_length=255)
    namespace: str = "default"
    uid: str = Field("", max_length=64, description="Of the Team object; another one, another team")
    takes_over: bool = Field(
        False, description="Whether an administrator gives it what an earlier team of the name has."
    )
    display_name: str = ""
    weight: float = Field(1.0, gt=0)
    quotas: Quotas = Field(default_factory=Quotas)
    models: list[str] = Field(default_factory=list, description="Allowed models; empty = all.")
    moderation_policy: str | None = Field(
        None, description="The policy by which its requests are checked beside the model's."
    )
    refusal: str | None = Field(None, description="Why the team may not draw; None = it may.")
    key_hashes: list[Digest] = Field(
        default_factory=list, description="sha256 of each API key, in hex."
    )


class GatewayTeams(Document):
    """The whole file."""

    teams: list[DeclaredTeam] = Field(default_factory=list)

"""Whose teams are: the answer of ``GET /internal/v1/teams`` at the gateways' internal port.

The job database knows which Team object a team belongs to; the operator asks, so that a Team whose
name is another one's says so.
"""

from __future__ import annotations

from pydantic import Field

from calotype.serving.core.derived_secrets import derived_secret
from calotype.serving.wire.document import Document, Part

TEAMS_PATH = "/internal/v1/teams"


def operator_token(internal_token: str) -> str:
    """What the operator shows."""
    return derived_secret(internal_token, "operator")


class OwnedTeam(Part):
    """A team of the job database, also one whose Team object is gone."""

    name: str
    namespace: str | None = Field(None, description="Of its Team object; null = it has none.")
    uid: str | None = Field(None, description="Of its Team object; null = it has none.")


class TeamOwners(Document):
    """The whole answer."""

    teams: list[OwnedTeam] = Field(default_factory=list)

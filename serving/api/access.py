"""Which adapters a team may use: ``spec.access`` of a LoRAAdapter."""

from __future__ import annotations

from collections.abc import Collection

from calotype.serving.api.catalog import Catalog
from calotype.serving.config import LoRAAdapter
from calotype.serving.errors import PermissionDenied
from calotype.serving.jobs.records import TeamRecord


def is_open(adapter: LoRAAdapter, team: TeamRecord | None) -> bool:
    """Whether the team may name the adapter; one that names no teams is open to all."""
    teams = adapter.spec.access.teams
    return not teams or (team is not None and team.name in teams)


def check_access(
    catalog: Catalog, model: str, wanted: Collection[str], team: TeamRecord | None
) -> None:
    """Checks the adapters of a request.

    Raises:
        PermissionDenied: one is for other teams.
    """
    for adapter in catalog.adapters(model):
        if adapter.name in wanted and not is_open(adapter, team):
            raise PermissionDenied(
                f"The adapter '{adapter.name}' of {model} is not open to the team "
                f"'{team.name if team is not None else 'without a name'}': its owner can add the "
                "team to spec.access.teams.",
                param="loras",
            )

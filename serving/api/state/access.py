"""What a team may use: ``spec.access`` of a LoRAAdapter; and by whose policies it is judged."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from calotype.serving.api.state.catalog import Catalog
from calotype.serving.config import LoRAAdapter
from calotype.serving.core.errors import PermissionDenied
from calotype.serving.jobs.records import TeamRecord


def is_open(adapter: LoRAAdapter, team: TeamRecord | None) -> bool:
    """Whether the team may name the adapter; one that names no teams is open to all."""
    teams = adapter.spec.access.teams
    return not teams or (team is not None and team.name in teams)


def check_access(
    catalog: Catalog, model: str, wanted: Collection[str], team: TeamRecord | None
) -> None:
    """Checks the team of a request, and its adapters.

    Raises:
        PermissionDenied: the team may not draw, or an adapter is for other teams.
    """
    closed = catalog.closed(team.name) if team is not None else None
    if closed is not None:
        raise PermissionDenied(f"The team may not draw at the moment: {closed}")
    for adapter in catalog.adapters(model):
        if adapter.name in wanted and not is_open(adapter, team):
            raise PermissionDenied(
                f"The adapter '{adapter.name}' of {model} is not open to the team "
                f"'{team.name if team is not None else 'without a name'}': its owner can add the "
                "team to spec.access.teams.",
                param="loras",
            )


def scope_for(
    catalog: Catalog,
    model: str,
    adapters: Collection[str],
    team: TeamRecord | None,
    wish: str | None = None,
) -> dict[str, Any] | None:
    """For whom a request is judged (`protocols.SafetyStage`); None = nobody in particular.

    Args:
        adapters: names of those that the request uses.
        wish: what the caller asked for (`moderation.presets.is_level`).
    """
    named = [team.policy] if team is not None and team.policy else []
    for adapter in catalog.adapters(model):
        ref = adapter.spec.moderation_policy_ref
        if ref is not None and adapter.name in adapters:
            named.append(ref.name)
    if not named and wish is None:
        return None
    scope: dict[str, Any] = {"policies": list(dict.fromkeys(named))}
    return scope if wish is None else scope | {"wish": wish}

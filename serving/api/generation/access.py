"""What a team may use, and by which policies and how strictly its requests are checked.

Who may use an adapter is ``spec.access`` of the LoRAAdapter (`Catalog.adapter_refs`). How strictly
a caller wants to be checked is OpenAI's ``moderation`` or BFL's ``safety_tolerance``; the policy
decides what is granted (`moderation.policy.presets`), and the answer says where it is less.
"""

from __future__ import annotations

from collections.abc import Collection

from calotype.serving.api.http.schemas import GenerationBody
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.core.errors import PermissionDenied
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import TeamRecord


def check_open(catalog: Catalog, team: TeamRecord | None) -> None:
    """Raises PermissionDenied when the team may neither draw nor have anything checked."""
    closed = catalog.closed(team.name) if team is not None else None
    if closed is not None:
        raise PermissionDenied(f"The team may not draw at the moment: {closed}")


def scope_for(
    catalog: Catalog,
    model: str,
    adapters: Collection[str],
    team: TeamRecord | None,
    level: str | None = None,
) -> JsonObject | None:
    """For whom a request is checked (`protocols.SafetyStage`); None = nobody in particular.

    Args:
        adapters: names of those that the request uses.
        level: how strictly the caller wants to be checked (`requested_level`).
    """
    named = [team.policy] if team is not None and team.policy else []
    for adapter in catalog.adapters(model):
        ref = adapter.spec.moderation_policy_ref
        if ref is not None and adapter.name in adapters:
            named.append(ref.name)
    if not named and level is None:
        return None
    scope: JsonObject = {"policies": list(dict.fromkeys(named))}
    return scope if level is None else scope | {"wish": level}


def requested_level(body: GenerationBody) -> str | None:
    """``low``, or ``0`` to ``6``; None = the policy as it is."""
    if body.safety_tolerance is not None:
        return str(body.safety_tolerance)
    return "low" if body.moderation == "low" else None


def level_parameters(body: GenerationBody) -> JsonObject:
    """The same as parameters: part of the recipe, since a picture may be blurred by it."""
    if body.safety_tolerance is not None:
        return {"safety_tolerance": body.safety_tolerance}
    return {"moderation": "low"} if body.moderation == "low" else {}


def level_warning(moderation: JsonObject | None) -> list[str]:
    """A sentence where a job was checked otherwise than its caller asked for.

    Args:
        moderation: of the job, with the prompt's decision as ``input``.
    """
    decision = (moderation or {}).get("input") or {}
    if decision.get("granted", True) or not decision.get("asked"):
        return []
    asked = decision["asked"]
    shown = "moderation 'low'" if asked == "low" else f"safety_tolerance {asked}"
    return [
        f"{shown} is not granted by the policy {decision.get('policy')}; "
        f"it was checked against {decision.get('preset')!r}."
    ]

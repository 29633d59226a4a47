"""Which Teams are served, and what is left of what they give themselves. Pure.

A team is known by its name everywhere, so one namespace's Team must not get another one's name.
What a Team gives itself is bounded by the administrator's grant for its namespace
(`OperatorSettings.team_grants`).
"""

from __future__ import annotations

from collections.abc import Mapping

from calotype.operator.api.conditions import Reason
from calotype.operator.kube.objects import Address, Object
from calotype.operator.planning.refusal import Refusal
from calotype.operator.settings import OperatorSettings, TeamGrant
from calotype.serving.config import Quotas, Team
from calotype.serving.config.team import ADMINISTRATORS

TEAM_BYTES = 600
"""Room kept for what a team's entry has beside its spec: keys, names, a refusal."""


def admit_teams(
    teams: Mapping[Address, Object], specs: Mapping[Address, Team], settings: OperatorSettings
) -> dict[Address, Refusal]:
    """Address -> why the gateways do not know the team; those that are not in it are known.

    Args:
        teams: whole objects.
        specs: those of them that can be read.
    """
    refused: dict[Address, Refusal] = {}
    names: dict[str, Address] = {}
    counts: dict[str, int] = {}
    size = 0

    def rank(address: Address) -> tuple[bool, str, Address]:
        granted = address[1] in settings.team_grant(address[0]).takes
        created = teams[address]["metadata"].get("creationTimestamp") or ""
        return not granted, created, address

    for address in sorted(teams, key=rank):
        if "deletionTimestamp" in teams[address]["metadata"]:
            continue
        namespace, name = address
        grant = settings.team_grant(namespace)
        owner = names.setdefault(name, address)
        team = specs.get(address)
        refusal = _name_refusal(address, owner, grant)
        if refusal is None and team is not None:
            counts[namespace] = counts.get(namespace, 0) + 1
            size += len(team.spec.model_dump_json()) + TEAM_BYTES
            refusal = (
                _too_many(namespace, counts[namespace], grant)
                or _too_much(size, settings)
                or _no_model(team, grant)
            )
        if refusal is not None:
            refused[address] = refusal
    return refused


def bounded(team: Team, grant: TeamGrant) -> tuple[Team, list[str]]:
    """The team as it is served, and a sentence for each field that is less than it asks for."""
    spec, told = team.spec, list[str]()
    changes: dict[str, object] = {}
    if spec.weight > grant.weight:
        changes["weight"] = grant.weight
        told.append(f"spec.weight {spec.weight:g} is served as {grant.weight:g}")
    quotas: dict[str, float | None] = {}
    for field in Quotas.model_fields:
        asked, most = getattr(spec.quotas, field), getattr(grant.quotas, field)
        quotas[field] = asked if most is None else most if asked is None else min(asked, most)
        if asked is not None and asked != quotas[field]:
            name = Quotas.model_fields[field].alias
            told.append(f"spec.quotas.{name} {asked:g} is served as {most:g}")
    changes["quotas"] = spec.quotas.model_copy(update=quotas)
    if grant.models:
        wanted = [name for name in spec.models or grant.models if name in grant.models]
        changes["models"] = wanted or spec.models  # no model would mean all; it is refused
        missing = [name for name in spec.models if name not in grant.models]
        if missing:
            told.append(f"spec.models has {', '.join(missing)}, which it may not use")
    return team.model_copy(update={"spec": spec.model_copy(update=changes)}), told


def _name_refusal(address: Address, owner: Address, grant: TeamGrant) -> Refusal | None:
    name = address[1]
    if name == ADMINISTRATORS and name not in grant.takes:
        return Refusal(
            Reason.NAME_RESERVED,
            f"{name} is the team of the service's own API key, and its jobs and pictures are not "
            "given to a Team: give this one another name.",
        )
    if owner == address:
        return None
    return Refusal(
        Reason.NAME_CONFLICT,
        f"Namespace {owner[0]} has a Team of this name, and jobs know a team by its name: "
        "give this one another.",
    )


def _too_many(namespace: str, count: int, grant: TeamGrant) -> Refusal | None:
    if count <= grant.teams:
        return None
    return Refusal(
        Reason.GRANT_EXCEEDED,
        f"Namespace {namespace} may have {grant.teams} Teams, and has older ones: delete one, or "
        "ask an administrator for more (operator.settings.teamGrants).",
    )


def _too_much(size: int, settings: OperatorSettings) -> Refusal | None:
    if size <= settings.max_config_bytes:
        return None
    return Refusal(
        Reason.CAPACITY_EXCEEDED,
        f"All Teams together would have {size:,} bytes, more than the "
        f"{settings.max_config_bytes:,} that fit into one object of the API server. This one is "
        "taken as soon as others are deleted.",
    )


def _no_model(team: Team, grant: TeamGrant) -> Refusal | None:
    if not (grant.models and team.spec.models) or set(grant.models) & set(team.spec.models):
        return None
    return Refusal(
        Reason.GRANT_EXCEEDED,
        f"spec.models names none of the models that namespace {team.metadata.namespace} may use: "
        f"{', '.join(grant.models)}. Name one of them, or ask an administrator for more "
        "(operator.settings.teamGrants).",
    )

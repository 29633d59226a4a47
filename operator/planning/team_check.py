"""Whether a Team can be served; and the policies that check a model's requests beside its own.

Pure. A refused team keeps its key and may read what it has; it may not draw.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from calotype.operator.api.conditions import Reason
from calotype.operator.kube.objects import Address, Object
from calotype.operator.manifests.custom_resources import InvalidSpec, parse
from calotype.operator.manifests.gateway_config import policy_name
from calotype.operator.planning.policies import (
    PolicyError,
    laxer_at,
    policy_of,
    read_base,
    read_policy,
)
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.team_grant import admit_teams, bounded
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel, Team
from calotype.serving.wire.document import JsonObject


@dataclass(frozen=True)
class Declared:
    """What is declared in the cluster, as far as teams depend on it."""

    teams: Mapping[Address, Object]
    """Whole objects."""
    policies: Mapping[Address, Object]
    """Specs of ModerationPolicies."""
    models: Mapping[Address, ImageModel]
    settings: OperatorSettings

    @functools.cached_property
    def specs(self) -> dict[Address, Team]:
        """The teams that can be read, within what their namespaces are granted."""
        found = {}
        for address, obj in self.teams.items():
            with contextlib.suppress(InvalidSpec):
                team = parse(Team, obj)
                found[address] = bounded(team, self.settings.team_grant(address[0]))[0]
        return found

    @functools.cached_property
    def refusals(self) -> dict[Address, Refusal]:
        """The teams that the gateways do not know, and why."""
        return admit_teams(self.teams, self.specs, self.settings)


def team_refusal(declared: Declared, address: Address, team: Team) -> Refusal | None:
    """Why a team must not draw; None = it may."""
    refusal = declared.refusals.get(address)
    if refusal is not None:
        return refusal
    ref = team.spec.moderation_policy_ref
    if ref is None:
        return None
    spec = declared.policies.get((address[0], ref.name))
    if spec is None:
        return Refusal(
            Reason.POLICY_MISSING,
            f"There is no accepted ModerationPolicy {ref.name} in namespace {address[0]}: create "
            "it, or correct spec.moderationPolicyRef.",
        )
    laxer = _laxer(declared, team, ref.name, spec)
    return None if laxer is None else Refusal(Reason.POLICY_LAXER, laxer)


def policies_beside(
    declared: Declared,
    model: ImageModel,
    adapters: Iterable[Object],
) -> dict[str, JsonObject]:
    """Name as in gateway.json -> spec, of the policies that teams and adapters of a model name.

    Args:
        adapters: manifests of those that the model's replicas have.
    """
    wanted = [
        (manifest["metadata"]["namespace"], ref["name"])
        for manifest in adapters
        if (ref := manifest["spec"].get("moderationPolicyRef")) is not None
    ]
    for address, team in declared.specs.items():
        named = team.spec.moderation_policy_ref
        if named is None or (team.spec.models and model.name not in team.spec.models):
            continue
        if team_refusal(declared, address, team) is None:
            wanted.append((address[0], named.name))
    return {
        policy_name(*address, declared.settings): dict(declared.policies[address])
        for address in sorted(set(wanted))
        if address in declared.policies
    }


def _laxer(declared: Declared, team: Team, name: str, spec: Object) -> str | None:
    """Where the team's policy lets something pass that the policy of one of its models does not."""
    try:
        own = read_policy(name, spec)
        for model in declared.models.values():
            if team.spec.models and model.name not in team.spec.models:
                continue
            place = laxer_at(own, read_base(policy_of(model, declared.policies)))
            if place is not None:
                return (
                    f"ModerationPolicy {name} is laxer than the one of model {model.name}: "
                    f"{place}. A team's policy may only be stricter."
                )
    except PolicyError as error:
        return str(error)
    return None

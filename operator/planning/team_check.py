"""Whether a Team can be served; and the policies that judge a model's requests beside its own.

Reads the store only. A refused team keeps its key and may read what it has; it may not draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from calotype.operator.api.conditions import Reason
from calotype.operator.manifests.custom_resources import InvalidSpec, parse
from calotype.operator.manifests.gateway_config import policy_name
from calotype.operator.planning.adapters import Address, Refusal
from calotype.operator.planning.policies import PolicyError, laxer_at, package_policy, read_policy
from calotype.operator.runtime.store import Store
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel, Team


def team_refusal(store: Store, address: Address, team: Team) -> Refusal | None:
    """Why a team must not draw; None = it may."""
    own = store.get("Team", address)
    mine = ((own or {}).get("metadata", {}).get("creationTimestamp") or "~", address)
    for other, obj in store.all("Team"):
        theirs = (obj["metadata"].get("creationTimestamp") or "", other)
        if other[1] == address[1] and other != address and theirs < mine:
            return Refusal(
                Reason.NAME_CONFLICT,
                f"Namespace {other[0]} has a Team of this name, and jobs know a team by its name: "
                "give this one another.",
            )
    ref = team.spec.moderation_policy_ref
    if ref is None:
        return None
    if store.get("ModerationPolicy", (address[0], ref.name)) is None:
        return Refusal(
            Reason.POLICY_MISSING,
            f"There is no ModerationPolicy {ref.name} in namespace {address[0]}: create it, or "
            "correct spec.moderationPolicyRef.",
        )
    laxer = _laxer(store, team)
    return None if laxer is None else Refusal(Reason.POLICY_LAXER, laxer)


def policies_beside(
    store: Store,
    settings: OperatorSettings,
    model: ImageModel,
    adapters: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Name as in gateway.json -> spec, of the policies that teams and adapters of a model name.

    Args:
        adapters: manifests of those that the model's replicas are told of.
    """
    wanted = [
        (manifest["metadata"]["namespace"], ref["name"])
        for manifest in adapters
        if (ref := manifest["spec"].get("moderationPolicyRef")) is not None
    ]
    for address, obj in store.all("Team"):
        try:
            team = parse(Team, obj)
        except InvalidSpec:
            continue
        named = team.spec.moderation_policy_ref
        if named is None or (team.spec.models and model.name not in team.spec.models):
            continue
        if team_refusal(store, address, team) is None:
            wanted.append((address[0], named.name))
    return {
        policy_name(*address, settings): dict(found["spec"])
        for address in sorted(set(wanted))
        if (found := store.get("ModerationPolicy", address)) is not None
    }


def _laxer(store: Store, team: Team) -> str | None:
    """Where the team's policy lets something pass that the policy of one of its models does not."""
    ref = team.spec.moderation_policy_ref
    namespace = team.metadata.namespace
    found = store.get("ModerationPolicy", (namespace, ref.name)) if ref else None
    if ref is None or found is None:
        return None
    try:
        own = read_policy(ref.name, found["spec"])
        for host in store.hosts().values():
            if team.spec.models and host.model.name not in team.spec.models:
                continue
            base = store.policy_of(host.model)
            place = laxer_at(own, read_policy(*base) if base is not None else package_policy())
            if place is not None:
                return (
                    f"ModerationPolicy {ref.name} is laxer than the one of model "
                    f"{host.model.name}: {place}. A team's policy may only be stricter."
                )
    except PolicyError as error:
        return str(error)
    return None

"""Team -> a Secret with an API key."""

from __future__ import annotations

from calotype.operator.api.conditions import Condition, Fact, Reason, false, true
from calotype.operator.kube.client import ApiError
from calotype.operator.kube.labels import ROTATION, owned_by
from calotype.operator.kube.objects import Address, Manifest, address_of
from calotype.operator.kube.resources import SECRETS, TEAMS
from calotype.operator.manifests.custom_resources import InvalidSpec, parse
from calotype.operator.manifests.team_key import (
    KEY_PREFIX,
    SECRET_KEY,
    build_secret,
    key_of,
    make_key,
    rotation_of,
    secret_name,
)
from calotype.operator.planning.team_check import team_refusal
from calotype.operator.planning.team_grant import bounded
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.workqueue import Key, Postponed
from calotype.serving.config import Team


async def reconcile_team(context: Context, key: Key) -> float | None:
    """One look at one team."""
    obj = await context.kube.get(TEAMS, key.namespace, key.name)
    if obj is None or "deletionTimestamp" in obj["metadata"]:
        if obj is not None:
            await context.finalizers.remove(TEAMS, obj)
        context.wake_gateway()
        return None
    try:
        team = parse(Team, obj)
    except InvalidSpec as error:
        types = (Condition.ACCEPTED, Condition.READY)
        facts = [false(type_, Reason.INVALID_SPEC, str(error)) for type_ in types]
        await context.statuses.write(obj, facts, {"phase": "Failed"})
        return None
    context.store.put("Team", obj)
    accepted = await _owned(context, obj, team) or _accepted(context, address_of(obj), team)
    if not accepted.holds:
        facts = [accepted, false(Condition.READY, accepted.reason, accepted.message)]
        await context.statuses.write(obj, facts, {"phase": "Failed"})
        context.wake_gateway()
        return context.settings.secret_poll_seconds * 20
    secret, key_ready = await _key(context, obj, team)
    facts = [
        accepted,
        key_ready,
        Fact(Condition.READY, key_ready.status, key_ready.reason, key_ready.message),
    ]
    fields: Manifest = {"phase": "Ready" if key_ready.holds else "Failed"}
    made = key_of(secret) if secret is not None and key_ready.holds else None
    if made is not None:
        fields |= {
            "keySecretRef": {"name": secret_name(team.name), "key": SECRET_KEY},
            "keyPrefix": made[: len(KEY_PREFIX) + 4] if made.startswith(KEY_PREFIX) else None,
            "rotation": str(team.spec.keys.rotate),
        }
    usage = (obj.get("status") or {}).get("usage")
    await context.statuses.write(obj, facts, {**fields, "usage": usage})
    context.wake_gateway()
    return context.settings.secret_poll_seconds * (20 if key_ready.holds else 1)


async def _owned(context: Context, obj: Manifest, team: Team) -> Fact | None:
    """That the job database has a team of this name which is another's; None = it has not."""
    metadata = obj["metadata"]
    if team.name in context.settings.team_grant(metadata["namespace"]).takes:
        return None
    owner = await context.team_owners.owner_of(team.name)
    if owner is None or (owner.namespace, owner.uid) == (metadata["namespace"], metadata["uid"]):
        return None
    whose = "an administrator made"
    if owner.uid is not None:
        whose = f"was given to the Team {owner.namespace}/{team.name} with uid {owner.uid}"
    text = (
        f"There is a team of this name that {whose}, with jobs and pictures, and a name is given "
        "out once: give this Team another one, or have an administrator hand the old one over "
        "(takes in operator.settings.teamGrants)."
    )
    return false(Condition.ACCEPTED, Reason.NAME_CONFLICT, text)


def _accepted(context: Context, address: Address, team: Team) -> Fact:
    refusal = team_refusal(context.store.declared(), address, team)
    if refusal is not None:
        return false(Condition.ACCEPTED, refusal.reason, refusal.message)
    _, less = bounded(team, context.settings.team_grant(address[0]))
    if less:
        text = f"{'; '.join(less)}: its namespace is granted no more by the administrator."
        return true(Condition.ACCEPTED, Reason.BOUNDED, text)
    return true(Condition.ACCEPTED, Reason.ACCEPTED, "The manifest can be used.")


async def _key(context: Context, obj: Manifest, team: Team) -> tuple[Manifest | None, Fact]:
    """The Secret, made or renewed where it has to be."""
    type_ = Condition.KEY_READY
    namespace, name = team.metadata.namespace, secret_name(team.name)
    rotation = team.spec.keys.rotate
    secret = await context.kube.get(SECRETS, namespace, name)
    if secret is None:
        await context.kube.create(build_secret(obj, make_key(), rotation, context.settings))
        secret = await context.kube.get(SECRETS, namespace, name)
    if secret is None or not owned_by(secret, obj):
        return None, false(
            type_,
            Reason.SECRET_NOT_OURS,
            f"Secret {name} is there, but not of this Team: delete it, and a key is made.",
        )
    if rotation_of(secret) != rotation or key_of(secret) is None:
        secret = await _renew(context, obj, secret, rotation)
    text = f"The key is in Secret {name}, entry {SECRET_KEY}."
    return secret, true(type_, Reason.KEY_CREATED, text)


async def _renew(context: Context, obj: Manifest, secret: Manifest, rotation: int) -> Manifest:
    """Another key in the same Secret; the old one is void as soon as the gateway hears of it."""
    fresh = build_secret(obj, make_key(), rotation, context.settings)
    body = {
        "metadata": {
            "resourceVersion": secret["metadata"]["resourceVersion"],
            "annotations": {ROTATION: str(rotation)},
        },
        "data": fresh["data"],
    }
    metadata = secret["metadata"]
    try:
        changed = await context.kube.patch(SECRETS, metadata["namespace"], metadata["name"], body)
    except ApiError as error:
        if error.status == 409:
            raise Postponed(0.5, "the Secret changed meanwhile") from error
        raise
    if changed is None:
        raise Postponed(0.5, "the Secret was deleted meanwhile")
    return changed

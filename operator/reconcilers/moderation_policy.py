"""ModerationPolicy -> part of the configuration of models and gateway."""

from __future__ import annotations

from calotype.operator.api.conditions import Condition, Reason, false, true
from calotype.operator.kube.resources import MODERATION_POLICIES
from calotype.operator.planning.policies import PolicyError, read_policy
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.workqueue import Key


async def reconcile_policy(context: Context, key: Key) -> float | None:
    """One look at one policy."""
    obj = await context.kube.get(MODERATION_POLICIES, key.namespace, key.name)
    if obj is None or "deletionTimestamp" in obj["metadata"]:
        if obj is not None:
            await context.finalizers.remove(MODERATION_POLICIES, obj)
        context.wake_gateway()
        return None
    context.store.put("ModerationPolicy", obj)
    used_by = count_users(context, key.namespace, key.name)
    refusal = context.store.policy_refusals().get((key.namespace, key.name))
    if refusal is not None:
        types = (Condition.ACCEPTED, Condition.READY)
        facts = [false(type_, refusal.reason, refusal.message) for type_ in types]
        await context.statuses.write(obj, facts, {"usedBy": used_by})
        return context.settings.resync_seconds
    try:
        policy = read_policy(key.name, obj.get("spec") or {})
    except PolicyError as error:
        types = (Condition.ACCEPTED, Condition.READY)
        facts = [false(type_, Reason.INVALID_SPEC, str(error)) for type_ in types]
        await context.statuses.write(obj, facts, {"usedBy": used_by})
        return None
    facts = [
        true(Condition.ACCEPTED, Reason.ACCEPTED, "The policy can be used."),
        true(Condition.READY, Reason.IN_USE if used_by else Reason.READY, policy.identity),
    ]
    await context.statuses.write(obj, facts, {"sha256": policy.sha256, "usedBy": used_by})
    context.wake_gateway()
    return None


def count_users(context: Context, namespace: str, name: str) -> int:
    """Models, adapters and teams of the namespace that refer to the policy."""
    count = 0
    for host in context.store.hosts().values():
        if host.model.metadata.namespace != namespace:
            continue
        ref = host.model.spec.moderation_policy_ref
        count += (ref.name if ref is not None else "default") == name
    for kind in ("LoRAAdapter", "Team"):
        for address, obj in context.store.all(kind):
            named = (obj["spec"].get("moderationPolicyRef") or {}).get("name")
            count += address[0] == namespace and named == name
    return count

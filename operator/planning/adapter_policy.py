"""Whether the ModerationPolicy that a LoRAAdapter names may check its requests. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from calotype.operator.api.conditions import Reason
from calotype.operator.kube.objects import Address, Object
from calotype.operator.planning.policies import (
    PolicyError,
    laxer_at,
    policy_of,
    read_base,
    read_policy,
)
from calotype.operator.planning.refusal import Refusal
from calotype.serving.config import ImageModel, LoRAAdapter


def policy_problem(
    adapter: LoRAAdapter, model: ImageModel | None, policies: Mapping[Address, Object]
) -> Refusal | None:
    """Why the adapter's policy cannot be used; None = it can, or the adapter names none.

    Args:
        model: None where it does not exist; the policy is compared with the package's then.
        policies: specs of ModerationPolicies.
    """
    ref = adapter.spec.moderation_policy_ref
    if ref is None:
        return None
    namespace = adapter.metadata.namespace
    spec = policies.get((namespace, ref.name))
    if spec is None:
        return Refusal(
            Reason.POLICY_MISSING,
            f"There is no accepted ModerationPolicy {ref.name} in namespace {namespace}: create "
            "it, or correct spec.moderationPolicyRef.",
        )
    base = policy_of(model, policies) if model is not None else None
    try:
        place = laxer_at(read_policy(ref.name, spec), read_base(base))
    except PolicyError as error:
        return Refusal(Reason.POLICY_MISSING, str(error))
    if place is None:
        return None
    return Refusal(
        Reason.POLICY_LAXER,
        f"ModerationPolicy {ref.name} is laxer than {base.name if base else 'the package'!r}, "
        f"which the model has: {place}. An adapter's policy may only be stricter.",
    )

"""ModerationPolicies: which one a model has, and whether another one is stricter.

Pure. A policy that an adapter or a team names may block more than the model's, never less.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.strictness import laxer_at
from calotype.operator.api.conditions import Reason
from calotype.operator.kube.objects import Address, Object
from calotype.operator.planning.refusal import Refusal
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class NamedSpec:
    """Name and spec of a ModerationPolicy."""

    name: str
    spec: Object


_PATHS = ("pictureLists", "pictureModels", "judge", "shadow")
"""Fields that name files in the pods where a policy is used."""


def admit_policies(
    policies: Mapping[Address, Object], settings: OperatorSettings
) -> dict[Address, Refusal]:
    """Address -> why a policy is not used; those that are not in it are.

    Policies travel with the configuration of every model that uses them, so all of them share
    its room: those of the operator's namespace first, then the older ones.

    Args:
        policies: whole objects.
    """
    refused: dict[Address, Refusal] = {}
    sizes: dict[str, int] = {}
    total = 0

    def rank(address: Address) -> tuple[bool, str, Address]:
        created = policies[address]["metadata"].get("creationTimestamp") or ""
        return address[0] != settings.operator_namespace, created, address

    for address in sorted(policies, key=rank):
        namespace, spec = address[0], policies[address]["spec"]
        size = len(json.dumps(spec, separators=(",", ":")))
        own = namespace == settings.operator_namespace
        refusal = _too_large(size, sizes.get(namespace, 0), total, own, settings)
        if refusal is None and not own:
            refusal = _names_files(namespace, spec)
        if refusal is not None:
            refused[address] = refusal
            continue
        sizes[namespace] = sizes.get(namespace, 0) + size
        total += size
    return refused


def _too_large(
    size: int, of_namespace: int, total: int, own: bool, settings: OperatorSettings
) -> Refusal | None:
    most, whose, has = settings.max_policy_bytes, "One policy", size
    if size <= most and not own:
        whose, has = "The policies of one namespace", of_namespace + size
    if has <= most:
        most, whose, has = settings.max_policies_bytes, "All policies together", total + size
    if has <= most:
        return None
    return Refusal(
        Reason.CAPACITY_EXCEEDED,
        f"{whose} may have {most:,} bytes as JSON, and would have {has:,}: policies travel with "
        "the configuration of every model. Shorten its terms, or delete other policies.",
    )


def _names_files(namespace: str, spec: Object) -> Refusal | None:
    named = [field for field in _PATHS if spec.get(field)]
    if not named:
        return None
    return Refusal(
        Reason.PATH_NOT_ALLOWED,
        f"spec.{named[0]} names files in the pods of models, which only a policy of the release's "
        f"own namespace may, not one of {namespace}: leave it out.",
    )


def policy_of(model: ImageModel, policies: Mapping[Address, Object]) -> NamedSpec | None:
    """The policy of a model; None = the package's.

    Args:
        policies: specs of ModerationPolicies.
    """
    ref = model.spec.moderation_policy_ref
    name = ref.name if ref is not None else DEFAULT
    spec = policies.get((model.metadata.namespace, name))
    return None if spec is None else NamedSpec(name, spec)


def read_base(base: NamedSpec | None) -> Policy:
    """The policy of a model as `policy_of` finds it.

    Raises:
        PolicyError: one sentence says what is wrong.
    """
    return package_policy() if base is None else read_policy(base.name, base.spec)


def read_policy(name: str, spec: Object) -> Policy:
    """The policy of an object's spec.

    Raises:
        PolicyError: one sentence says what is wrong.
    """
    return Policy.from_spec(name, spec)


@functools.cache
def package_policy() -> Policy:
    """The policy of a model that names none."""
    return Policy.default()


__all__ = [
    "DEFAULT",
    "NamedSpec",
    "PolicyError",
    "laxer_at",
    "package_policy",
    "policy_of",
    "read_base",
    "read_policy",
]

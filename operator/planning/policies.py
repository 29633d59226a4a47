"""ModerationPolicies: which one a model has, and whether another one is stricter.

Pure. A policy that an adapter or a team names may block more than the model's, never less.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.strictness import laxer_at
from calotype.operator.kube.objects import Address, Object
from calotype.serving.config import ImageModel

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class NamedSpec:
    """Name and spec of a ModerationPolicy."""

    name: str
    spec: Object


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

"""ModerationPolicies: which one a model has, and whether another one is stricter.

Pure. A policy that an adapter or a team names may block more than the model's, never less.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.strictness import laxer_at

DEFAULT = "default"


def read_policy(name: str, spec: Mapping[str, Any]) -> Policy:
    """The policy of an object's spec.

    Raises:
        PolicyError: one sentence says what is wrong.
    """
    return Policy.from_spec(name, spec)


@functools.cache
def package_policy() -> Policy:
    """The policy of a model that names none."""
    return Policy.default()


__all__ = ["DEFAULT", "PolicyError", "laxer_at", "package_policy", "read_policy"]

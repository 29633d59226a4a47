"""ModerationPolicies: which one a model has, and whether another one is stricter.

Pure. A policy that an adapter or a team names may block more than the model's, never less.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy import Category, Modality, Policy, Rule

DEFAULT = "default"
_EFFECTS = ("block", "review", "blur", "flag")
"""Most severe first; each is as good as a less severe one."""


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


def laxer_at(policy: Policy, base: Policy) -> str | None:
    """Where ``policy`` lets something pass that ``base`` does not; None = nowhere."""
    missing = sorted(set(base.lists) - set(policy.lists))
    if missing:
        return f"lists: {missing[0]} is missing"
    held = {(terms.category, term) for terms in policy.terms for term in terms.terms}
    for terms in base.terms:
        for term in terms.terms:
            if terms.action != "flag" and (terms.category, term) not in held:
                return f"terms: {term!r} of {terms.category} is missing"
    for category in Category:
        for modality in Modality:
            there = _laxer_rule(policy.rule(category, modality), base.rule(category, modality))
            if there is not None:
                return f"categories.{category}.{modality}.{there}"
    return None


def _laxer_rule(rule: Rule, base: Rule) -> str | None:
    """A score at which ``rule`` does less than ``base`` would."""
    for index, effect in enumerate(_EFFECTS[:3]):
        bound = getattr(base, effect)
        if bound is None:
            continue
        own = [getattr(rule, name) for name in _EFFECTS[: index + 1]]
        lowest = min((score for score in own if score is not None), default=None)
        if lowest is None:
            return f"{effect} is missing, and {bound} there"
        if lowest > bound:
            return f"{effect} is {lowest}, above {bound}"
    return None


__all__ = ["DEFAULT", "PolicyError", "laxer_at", "package_policy", "read_policy"]

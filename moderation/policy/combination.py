"""The strictest of several policies: the model's, the team's, those of the adapters.

Where one of them is at least as strict as all others, it applies alone. Else their rules are
combined: the lowest of every threshold, and all lists and terms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from calotype.moderation.policy.categories import Category
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.presets import at_preset
from calotype.moderation.policy.rules import EFFECTS, MODALITIES, CategoryRules, JudgeRules, Rule
from calotype.moderation.policy.strictness import laxer_at


class AppliedPolicy(Policy):
    """The policy in force where that is not one document as it was written."""

    identities: tuple[str, ...]
    digest: str
    all_judges: tuple[JudgeRules, ...]

    @property
    def identity(self) -> str:
        """``default@1``, or ``house@3+default@1``."""
        return "+".join(self.identities)

    @cached_property
    def sha256(self) -> str:
        """Of one document its digest; of several one over theirs."""
        return self.digest

    @property
    def judges(self) -> tuple[JudgeRules, ...]:
        return self.all_judges


def at(policy: Policy, preset: str) -> Policy:
    """A policy at one of its presets; it keeps its name, version and digest."""
    return _applied(policy, [policy], categories=at_preset(policy, preset))


def strictest(policies: Sequence[Policy]) -> Policy:
    """What is refused by all of ``policies`` together.

    Args:
        policies: the most specific one first: what has nothing to do with strictness (privacy,
            messages) is taken from there.
    """
    unique = list({policy.sha256 + policy.identity: policy for policy in policies}.values())
    for candidate in unique:
        if all(_covers(candidate, other) for other in unique if other is not candidate):
            return candidate
    first = unique[0]
    models: dict[str, str] = {}
    for policy in unique:
        models = dict(policy.picture_models) | models
    return _applied(
        first,
        unique,
        categories=_categories(unique),
        lists=_union(name for policy in unique for name in policy.lists),
        terms=_union(terms for policy in unique for terms in policy.terms),
        picture_lists=_union(name for policy in unique for name in policy.picture_lists),
        picture_models=models,
        shadow=_union(rules for policy in unique for rules in policy.shadow),
        messages={k: v for policy in reversed(unique) for k, v in policy.messages.items()},
        on_error="block" if any(p.on_error == "block" for p in unique) else "review",
        timeout_seconds=max(policy.timeout_seconds for policy in unique),
    )


def _covers(policy: Policy, other: Policy) -> bool:
    """Whether ``policy`` refuses all that ``other`` does."""
    return laxer_at(policy, other) is None and set(other.judges) <= set(policy.judges)


def _applied(first: Policy, made_of: Sequence[Policy], **changes: Any) -> AppliedPolicy:
    fields = {name: getattr(first, name) for name in Policy.model_fields}
    digest = first.sha256
    if len(made_of) > 1:
        together = "\n".join(policy.sha256 for policy in made_of)
        digest = hashlib.sha256(together.encode()).hexdigest()
    return AppliedPolicy.model_construct(
        **fields | changes,
        identities=tuple(policy.identity for policy in made_of),
        digest=digest,
        all_judges=_union(judge for policy in made_of for judge in policy.judges),
    )


def _categories(policies: Sequence[Policy]) -> dict[Category, CategoryRules]:
    named = _union(category for policy in policies for category in policy.categories)
    strict: dict[Category, CategoryRules] = {}
    for category in named:
        rules = [
            policy.categories[category] for policy in policies if category in policy.categories
        ]
        lowest = {
            modality: _lowest([getattr(rule, modality) for rule in rules])
            for modality in MODALITIES
        }
        strict[category] = CategoryRules.model_validate(lowest)
    return strict


def _lowest(rules: Sequence[Rule]) -> Rule:
    limits: dict[str, float | None] = {}
    for effect in EFFECTS:
        given = [limit for rule in rules if (limit := getattr(rule, effect)) is not None]
        limits[effect] = min(given, default=None)
    block, flag = limits["block"], limits["flag"]
    if block is not None and flag is not None and flag > block:
        limits["flag"] = None
    return Rule(**limits)


def _union(things: Iterable[Any]) -> tuple[Any, ...]:
    """Each once, in their order; pydantic's frozen models cannot always be hashed."""
    found: list[Any] = []
    for thing in things:
        if thing not in found:
            found.append(thing)
    return tuple(found)

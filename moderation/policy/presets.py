"""What a caller may ask for: stricter thresholds, or laxer ones as far as the policy goes.

OpenAI's ``moderation: low`` and BFL's ``safety_tolerance`` of 0 to 6 are read here. A policy names
the levels that it grants; what is beyond them is answered by the nearest level that is granted, and
by the stricter one where there is a choice.
"""

from __future__ import annotations

from calotype.moderation.policy.categories import Category
from calotype.moderation.policy.rules import EFFECTS, MODALITIES, CategoryRules, Preset, Rule
from calotype.moderation.policy.spec import PolicySpec

OWN = 2
"""The ``safety_tolerance`` that is the policy itself."""
MOST = 6
STRICT = ("strictest", "strict")
LAX = ("low", "lowest")
LOW = "low"
"""The preset of ``moderation: low``, and how a caller's wish for it is written."""


def is_level(text: str) -> bool:
    """Whether a caller may ask so: ``low``, or ``0`` to ``6``."""
    return text == LOW or text in {str(level) for level in range(MOST + 1)}


def granted(policy: PolicySpec, requested: str) -> tuple[str | None, bool]:
    """The preset that a wish gets (None = the policy itself), and whether it is what was asked for.

    Args:
        requested: see `is_level`.
    """
    if requested == LOW:
        return (LOW, True) if policy.presets.low is not None else (None, False)
    level = int(requested)
    if level == OWN:
        return None, True
    levels = {
        tolerance: name
        for name in (*STRICT, *LAX)
        for tolerance in (preset_of(policy, name) or _NOTHING).tolerances
    }
    if level in levels:
        return levels[level], True
    same_side = sorted(known for known in levels if (known < OWN) == (level < OWN))
    stricter = [known for known in same_side if known < level]
    if stricter:
        return levels[stricter[-1]], False
    return (levels[same_side[0]], False) if same_side and level < OWN else (None, False)


def at_preset(policy: PolicySpec, name: str) -> dict[Category, CategoryRules]:
    """The thresholds of a policy with those of one of its presets."""
    preset = preset_of(policy, name)
    found = dict(policy.categories)
    for category, rules in (preset or _NOTHING).categories.items():
        own = found.get(category, CategoryRules())
        changed = {
            modality: _changed(getattr(own, modality), getattr(rules, modality))
            for modality in MODALITIES
        }
        found[category] = CategoryRules.model_validate(changed)
    return found


def preset_of(policy: PolicySpec, name: str) -> Preset | None:
    """The preset of that name (one of `STRICT` or `LAX`); None if the policy has none."""
    found: Preset | None = getattr(policy.presets, name)
    return found


_NOTHING = Preset.model_construct(tolerances=(), categories={})


def _changed(own: Rule, preset: Rule) -> Rule:
    limits = {
        effect: getattr(own, effect) if getattr(preset, effect) is None else getattr(preset, effect)
        for effect in EFFECTS
    }
    if limits["block"] is not None and (limits["flag"] or 0.0) > limits["block"]:
        limits["flag"] = None
    return Rule(**limits)

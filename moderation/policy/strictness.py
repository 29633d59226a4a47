"""Which of two policies is stricter, and a policy that adds to a floor without loosening it.

Pure, over `spec.PolicySpec`. A policy that another one extends may be made to refuse more, never
less: what its author leaves out is taken from below, and what would let something pass that the
floor refuses is an error that names the field.
"""

from __future__ import annotations

from calotype.moderation.documents import JsonObject
from calotype.moderation.policy.rules import EFFECTS, MODALITIES, Rule
from calotype.moderation.policy.spec import PolicySpec


def laxer_at(policy: PolicySpec, base: PolicySpec) -> str | None:
    """Where ``policy`` lets something pass that ``base`` does not; None = nowhere."""
    for field, given, needed in (
        ("lists", policy.lists, base.lists),
        ("pictureLists", policy.picture_lists, base.picture_lists),
        ("pictureModels", policy.picture_models, base.picture_models),
    ):
        missing = sorted(set(needed) - set(given))
        if missing:
            return f"{field}: {missing[0]} is missing"
    held = {(terms.category, term) for terms in policy.terms for term in terms.terms}
    for terms in base.terms:
        for term in terms.terms:
            if terms.action != "flag" and (terms.category, term) not in held:
                return f"terms: {term!r} of {terms.category} is missing"
    for category, rules in base.categories.items():
        own = policy.categories.get(category)
        for modality in MODALITIES:
            rule = getattr(own, modality) if own is not None else None
            there = _laxer_rule(rule, getattr(rules, modality))
            if there is not None:
                return f"categories.{category}.{modality}.{there}"
    return None


def _laxer_rule(rule: Rule | None, base: Rule) -> str | None:
    """A score at which ``rule`` does less than ``base`` would."""
    for index, effect in enumerate(EFFECTS[:3]):
        bound = getattr(base, effect)
        if bound is None:
            continue
        own = [getattr(rule, name, None) for name in EFFECTS[: index + 1]]
        lowest = min((score for score in own if score is not None), default=None)
        if lowest is None:
            return f"{effect} is missing, and {bound} there"
        if lowest > bound:
            return f"{effect} is {lowest}, above {bound}"
    return None


def completed(document: JsonObject, floor: PolicySpec) -> JsonObject:
    """The document of a policy with everything that it leaves out taken from ``floor``.

    Args:
        document: camelCase, as in YAML; its own thresholds, lists and terms stay.
    """
    below = floor.model_dump(mode="json", by_alias=True, exclude_none=True)
    whole = {name: below[name] for name in ("onError",)} | document
    whole["lists"] = list(dict.fromkeys([*below["lists"], *document.get("lists", ())]))
    whole["pictureLists"] = list(
        dict.fromkeys([*below["pictureLists"], *document.get("pictureLists", ())])
    )
    whole["pictureModels"] = below["pictureModels"] | document.get("pictureModels", {})
    whole["terms"] = [*below["terms"], *document.get("terms", ())]
    own_messages = document.get("messages", {})
    whole["messages"] = below["messages"] | own_messages
    whole["categories"] = categories = dict(document.get("categories", {}))
    for category, rules in below["categories"].items():
        own = dict(categories.get(category, {}))
        for modality in MODALITIES:
            own[modality] = _completed_rule(own.get(modality, {}), rules[modality])
        categories[category] = own
    presets = _inherited_presets(below["presets"], document.get("presets", {}), categories)
    if presets:
        whole["presets"] = presets
    return whole


def _inherited_presets(below: JsonObject, own: JsonObject, categories: JsonObject) -> JsonObject:
    """The presets of a policy, and the stricter ones of the policy below at levels left free.

    An inherited preset is as strict as the policy's own thresholds at least. Laxer ones are not
    inherited: how far callers may go is for each policy's author to say.
    """
    found = dict(own)
    taken = {level for preset in own.values() for level in preset.get("tolerances", ())}
    for name in ("strictest", "strict"):
        levels = [
            level for level in below.get(name, {}).get("tolerances", ()) if level not in taken
        ]
        if name in own or not levels:
            continue
        strict = {
            category: {
                modality: _stricter(rule, categories.get(category, {}).get(modality, {}))
                for modality, rule in rules.items()
            }
            for category, rules in below[name]["categories"].items()
        }
        found[name] = {"tolerances": levels, "categories": strict}
    return found


def _stricter(preset: JsonObject, own: JsonObject) -> JsonObject:
    lowest = {effect: min(limit, own.get(effect, limit)) for effect, limit in preset.items()}
    block = lowest.get("block", own.get("block"))
    if "flag" in lowest and block is not None and lowest["flag"] > block:
        del lowest["flag"]
    return lowest


def _completed_rule(own: JsonObject, below: JsonObject) -> JsonObject:
    rule = below | own
    # A threshold above which something more severe happens is never reached.
    if "flag" not in own and "block" in rule and rule.get("flag", 0.0) > rule["block"]:
        del rule["flag"]
    return rule

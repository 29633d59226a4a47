"""The shape of OpenAI's ``/v1/moderations``: one entry of ``results``."""

from __future__ import annotations

from calotype.moderation.decision import Decision
from calotype.moderation.documents import JsonObject
from calotype.moderation.policy.categories import OPENAI_CATEGORIES


def openai_result(decision: Decision) -> JsonObject:
    """13 booleans, 13 scores and the kind of input, whatever categories of ours fired besides."""
    return openai_result_of_payload(decision.to_payload())


def openai_result_of_payload(payload: JsonObject) -> JsonObject:
    """The same from `Decision.to_payload`, which is what crosses process boundaries.

    A category is true when the policy does not let it pass or flags it. Nothing is known of an
    image's or prompt's categories when the stage was unavailable: ask ``payload["unavailable"]``.
    """
    kind = "text" if payload["stage"] == "input" else "image"
    found = set(payload["flagged_categories"])
    scores = payload["scores"]
    return {
        "flagged": payload["flagged"],
        "categories": {category.value: category.value in found for category in OPENAI_CATEGORIES},
        "category_scores": {
            category.value: float(scores.get(category.value, 0.0)) for category in OPENAI_CATEGORIES
        },
        "category_applied_input_types": {
            category.value: [kind] if category.value in scores or kind == "text" else []
            for category in OPENAI_CATEGORIES
        },
    }

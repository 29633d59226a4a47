"""The errors by which the safety stage refuses a job, in the wording that clients rely on."""

from __future__ import annotations

from collections.abc import Sequence

from calotype.moderation.policy.refusals import held_message, refusal_message
from calotype.serving.core.errors import ContentBlocked
from calotype.serving.jobs.moderation_record import HeldEntry

HELD_FOR_REVIEW = "held_for_review"
"""Code of the error of a job whose images all wait for a reviewer."""

APPEALS = "/v1/moderation/appeals"
"""Where a refusal is appealed against, on the gateway that answered."""


def held_error(held: Sequence[HeldEntry], request_id: str) -> ContentBlocked:
    """Every image that could be shown waits for a reviewer."""
    names = sorted({name for entry in held for name in entry.categories})
    return ContentBlocked(
        "Your request was held by the safety system: a person looks at the pictures before "
        "anybody sees them, and those that are approved appear as the assets named in "
        f"error.moderation.held. Request ID {request_id}. safety_violations=[{','.join(names)}].",
        code=HELD_FOR_REVIEW,
        details={
            "moderation_details": {"moderation_stage": "output", "categories": names},
            "moderation": {
                "held": [entry.to_payload() for entry in held],
                "user_message": held_message(),
            },
        },
    )


def blocked_error(
    stage: str,
    categories: Sequence[str],
    request_id: str,
    *,
    decision_id: str | None = None,
    policy: str | None = None,
    own_words: str | None = None,
) -> ContentBlocked:
    """The refusal of docs/api.md; ``stage`` is ``input`` or ``output``.

    LiteLLM recognises the first sentence, so its wording is part of the interface. The sentence for
    people is ``moderation.user_message``, which the gateway says in the caller's language.

    Args:
        own_words: what the policy's owner tells people, if anything.
    """
    names = sorted(set(categories))
    return ContentBlocked(
        "Your request was rejected as a result of the safety system. If you believe this is an "
        "error, contact your administrator and include the request ID "
        f"{request_id}. safety_violations=[{','.join(names)}].",
        details={
            "moderation_details": {"moderation_stage": stage, "categories": names},
            "moderation": {
                "decision_id": decision_id,
                "policy": policy,
                "appeal_url": APPEALS if decision_id else None,
                "user_message": refusal_message(names, own_words),
            },
        },
    )

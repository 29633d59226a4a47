"""Refusals in the language that a client asks for with ``Accept-Language``.

A job remembers the language of the request that made it: its events and webhooks are told in it.
"""

from __future__ import annotations

import copy

from calotype.moderation.policy.refusals import held_message, preferred_language, refusal_message
from calotype.serving.core.errors import CalotypeError
from calotype.serving.jobs.refusals import HELD_FOR_REVIEW


def localized(error: CalotypeError, accept_language: str) -> CalotypeError:
    """The same error, with ``moderation.user_message`` in the best language there is.

    Its shape and its ``message`` stay: programs read those.
    """
    moderation = error.details.get("moderation")
    if not isinstance(moderation, dict) or "user_message" not in moderation:
        return error
    categories = error.details.get("moderation_details", {}).get("categories", [])
    language = preferred_language(accept_language)
    if error.code == HELD_FOR_REVIEW:
        sentence = held_message(language)
    else:
        sentence = refusal_message(categories, moderation["user_message"], language)
    answered = copy.copy(error)
    answered.details = error.details | {"moderation": moderation | {"user_message": sentence}}
    return answered

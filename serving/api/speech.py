"""Refusals in the language that a client asks for with ``Accept-Language``."""

from __future__ import annotations

import copy

from calotype.moderation.refusals import preferred_language, told
from calotype.serving.errors import CalotypeError


def spoken(error: CalotypeError, accept_language: str) -> CalotypeError:
    """The same error, with ``moderation.user_message`` in the best language there is.

    Its shape and its ``message`` stay: programs read those.
    """
    moderation = error.details.get("moderation")
    if not isinstance(moderation, dict) or "user_message" not in moderation:
        return error
    categories = error.details.get("moderation_details", {}).get("categories", [])
    sentence = told(categories, moderation["user_message"], preferred_language(accept_language))
    answered = copy.copy(error)
    answered.details = error.details | {"moderation": moderation | {"user_message": sentence}}
    return answered

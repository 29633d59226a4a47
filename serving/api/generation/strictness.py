"""How strictly a caller wants to be judged: OpenAI's ``moderation``, BFL's ``safety_tolerance``.

What is granted is the policy's affair (`moderation.presets`); the answer says where it is less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype.serving.api.http.schemas import GenerationBody


def requested_level(body: GenerationBody) -> str | None:
    """``low``, or ``0`` to ``6``; None = the policy as it is."""
    if body.safety_tolerance is not None:
        return str(body.safety_tolerance)
    return "low" if body.moderation == "low" else None


def level_parameters(body: GenerationBody) -> dict[str, Any]:
    """The same as parameters: part of the recipe, since a picture may be blurred by it."""
    if body.safety_tolerance is not None:
        return {"safety_tolerance": body.safety_tolerance}
    return {"moderation": "low"} if body.moderation == "low" else {}


def level_warning(moderation: Mapping[str, Any] | None) -> list[str]:
    """A sentence where a job was judged otherwise than its caller asked for.

    Args:
        moderation: of the job, with the prompt's decision as ``input``.
    """
    decision = (moderation or {}).get("input") or {}
    if decision.get("granted", True) or not decision.get("asked"):
        return []
    asked = decision["asked"]
    shown = "moderation 'low'" if asked == "low" else f"safety_tolerance {asked}"
    return [
        f"{shown} is not granted by the policy {decision.get('policy')}; "
        f"it was judged by {decision.get('preset')!r}."
    ]

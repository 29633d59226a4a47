"""Fields that this version takes and does not act upon: each is told, none is ignored in silence.

Pure. Whoever makes one of them work takes its sentence out of here.
"""

from __future__ import annotations

from collections.abc import Iterator

from calotype.operator.conditions import Condition, Fact, Reason, false
from calotype.serving.config import LoRAAdapter, Team


def unused_fields(resource: LoRAAdapter | Team) -> list[Fact]:
    """One condition that names all of them; none where there are none."""
    if isinstance(resource, LoRAAdapter):
        sentences = list(_of_adapter(resource))
    else:
        sentences = list(_of_team(resource))
    if not sentences:
        return []
    return [false(Condition.FIELDS_USED, Reason.NOT_YET_USED, " ".join(sentences))]


def _of_adapter(adapter: LoRAAdapter) -> Iterator[str]:
    if adapter.spec.moderation_policy_ref is not None:
        yield (
            "spec.moderationPolicyRef: requests that name the adapter are judged by the model's "
            "policy; give the model the stricter one."
        )
    if adapter.spec.preload == "Always":
        yield (
            "spec.preload: it comes to the device with the first request that names it, and makes "
            "room for others when it was not used for long."
        )
    if adapter.spec.probe is not None:
        yield "spec.probe: no picture is drawn after a load; draw it with a request of your own."


def _of_team(team: Team) -> Iterator[str]:
    if team.spec.moderation_policy_ref is not None:
        yield (
            "spec.moderationPolicyRef: the team's requests are judged by the model's policy; give "
            "the team a model of its own with the stricter one."
        )

"""By which ModerationPolicies requests are judged, where manifests come from files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.strictness import laxer_at
from calotype.serving.config import ImageModel, LoRAAdapter, Manifests, Team
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.database.database import Database
from calotype.serving.wire.application import ModeratorConfig, NamedPolicy

DEFAULT = "default"


def moderation_of(model: ImageModel, manifests: Manifests) -> ModeratorConfig:
    """The model's policy, and those that are named beside it."""
    base = _base(model, manifests)
    named = {
        ref.name
        for owner in _named_by(model, manifests)
        if (ref := owner.spec.moderation_policy_ref) is not None
    }
    own = None if base is None else NamedPolicy(name=base, spec=manifests.policies[base])
    beside = {name: manifests.policies[name] for name in sorted(named)}
    return ModeratorConfig(policy=own, policies=beside)


def check_policies(manifests: Manifests) -> None:
    """Reads every policy, and compares those of teams and adapters with the model's.

    Raises:
        InvalidRequest: one says what no policy may say, or is laxer; names policy and field.
    """
    try:
        read = {name: Policy.from_spec(name, spec) for name, spec in manifests.policies.items()}
    except PolicyError as error:
        raise InvalidRequest(str(error)) from error
    for model in manifests.models:
        name = _base(model, manifests)
        base = Policy.default() if name is None else read[name]
        for owner in _named_by(model, manifests):
            ref = owner.spec.moderation_policy_ref
            place = laxer_at(read[ref.name], base) if ref is not None else None
            if ref is not None and place is not None:
                raise InvalidRequest(
                    f"{owner.kind} {owner.name}: ModerationPolicy {ref.name} is laxer than "
                    f"{base.name!r}, which the model {model.name} has: {place}. A policy beside "
                    "the model's may only be stricter."
                )


def declare_teams(database: Database, before: Sequence[Team], now: Sequence[Team]) -> None:
    """Makes weights, limits and policies of teams what their manifests say.

    Keys are made by `calotype keys create --team`; a team whose manifest went has no limits left.

    Args:
        before: those whose manifests were there when this was called last.
    """
    for team in before:
        if all(team.name != other.name for other in now):
            database.api_keys.declare_team({"name": team.name})
    for team in now:
        spec = team.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        policy = (spec.get("moderationPolicyRef") or {}).get("name")
        database.api_keys.declare_team({"name": team.name, **spec, "moderationPolicy": policy})


def _base(model: ImageModel, manifests: Manifests) -> str | None:
    """The model's policy: the one that it names, or ``default``, or one that nobody names."""
    ref = model.spec.moderation_policy_ref
    if ref is not None:
        return ref.name
    if DEFAULT in manifests.policies:
        return DEFAULT
    owners: list[ImageModel | LoRAAdapter | Team] = [
        *manifests.models,
        *manifests.adapters,
        *manifests.teams,
    ]
    refs = [owner.spec.moderation_policy_ref for owner in owners]
    named = {ref.name for ref in refs if ref is not None}
    return next((name for name in manifests.policies if name not in named), None)


def _named_by(model: ImageModel, manifests: Manifests) -> Iterator[LoRAAdapter | Team]:
    """Teams and adapters that name a policy for requests to the model."""
    for adapter in manifests.adapters:
        if adapter.spec.model_ref.name == model.name and adapter.spec.moderation_policy_ref:
            yield adapter
    for team in manifests.teams:
        if team.spec.moderation_policy_ref is not None:
            if not team.spec.models or model.name in team.spec.models:
                yield team

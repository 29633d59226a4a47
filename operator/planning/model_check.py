"""Which models are accepted: what one object cannot say of itself, for it depends on others.

Pure. A model that is not accepted keeps running as it is; nothing new of it is applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from calotype.operator.api.conditions import Reason
from calotype.operator.kube.objects import Address, Object
from calotype.operator.manifests.application import gpu_shares
from calotype.operator.planning.adapters import (
    relative_path,
)
from calotype.operator.planning.model_names import name_refusal, names_of
from calotype.operator.planning.policies import PolicyError, read_policy
from calotype.operator.planning.refusal import Refusal
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel


def check_models(
    models: Mapping[Address, ImageModel],
    created: Mapping[Address, str],
    policies: Mapping[Address, Object],
    settings: OperatorSettings,
) -> dict[Address, Refusal]:
    """Address -> why the model is not accepted; those that are not in it are."""
    refused: dict[Address, Refusal] = {}
    names: dict[str, Address] = {}
    size = 0

    def rank(address: Address) -> tuple[bool, str, Address]:
        return address[0] != settings.operator_namespace, created.get(address, ""), address

    for address in sorted(models, key=rank):
        model = models[address]
        bytes_with = size + len(model.spec.model_dump_json(by_alias=True, exclude_none=True))
        refusal = name_refusal(model, address, names, settings) or _room(bytes_with, settings)
        if refusal is not None:
            refused[address] = refusal
            continue
        size = bytes_with
        names |= dict.fromkeys(names_of(model), address)
        refusal = (
            relative_path(model.spec.source)
            or _profile(model, settings)
            or _devices(model, settings)
            or _policy(model, policies)
            or _upgrade(model, settings)
            or _fallback(address, models)
        )
        if refusal is not None:
            refused[address] = refusal
    return refused


UNKNOWN_TO_GATEWAYS = frozenset(
    {Reason.NAME_CONFLICT, Reason.NAME_NOT_GRANTED, Reason.CAPACITY_EXCEEDED}
)
"""Refusals of models that gateways do not hear of; refused for others, they stay on offer."""


def _room(size: int, settings: OperatorSettings) -> Refusal | None:
    if size <= settings.max_model_bytes:
        return None
    return Refusal(
        Reason.CAPACITY_EXCEEDED,
        f"The manifests of all models would have {size:,} bytes with this one, more than the "
        f"{settings.max_model_bytes:,} that have room in the gateways' configuration. It is taken "
        "as soon as others are deleted.",
    )


def _profile(model: ImageModel, settings: OperatorSettings) -> Refusal | None:
    if model.spec.source.provider is not None:
        return None
    wanted = {"spec.resourceProfile": model.spec.resource_profile}
    encoder = model.spec.text_encoder
    if encoder is not None and encoder.resource_profile is not None:
        wanted["spec.textEncoder.resourceProfile"] = encoder.resource_profile
    for field, name in wanted.items():
        if settings.profile(name) is None:
            known = ", ".join(sorted({"default", *settings.resource_profiles}))
            return Refusal(
                Reason.PROFILE_UNKNOWN,
                f"{field} is {name!r}, but resourceProfiles of the chart has {known}: name one of "
                "them, or add it to the chart's values.",
            )
    return None


def _devices(model: ImageModel, settings: OperatorSettings) -> Refusal | None:
    """More devices for a picture than a replica of the profile has GPUs."""
    spec, wanted = model.spec, model.spec.acceleration.devices_per_picture
    profile = settings.profile(spec.resource_profile)
    if wanted == 1 or spec.source.provider is not None or profile is None or not profile.gpus:
        return None
    encoder = None
    if spec.text_encoder is not None:
        encoder = settings.profile(spec.text_encoder.resource_profile or spec.resource_profile)
    own = math.ceil(gpu_shares(profile, encoder)[0])
    if wanted <= own:
        return None
    shared = "" if own == profile.gpus else ", for the text encoder takes one of them"
    advice = "" if own == profile.gpus else ", or give the text encoder its own by spec.textEncoder"
    return Refusal(
        Reason.INVALID_SPEC,
        f"spec.acceleration.devicesPerPicture is {wanted}, but a replica of the resourceProfile "
        f"{spec.resource_profile!r} draws on {own} of {profile.gpus} GPUs{shared}: lower it, name "
        f"a profile with more{advice}.",
    )


def _policy(model: ImageModel, policies: Mapping[Address, Object]) -> Refusal | None:
    ref = model.spec.moderation_policy_ref
    address = (model.metadata.namespace, ref.name if ref is not None else "default")
    spec = policies.get(address)
    if spec is None:
        if ref is None:
            return None
        return Refusal(
            Reason.POLICY_MISSING,
            f"There is no accepted ModerationPolicy {ref.name} in namespace {address[0]}: create "
            "it, or correct spec.moderationPolicyRef. Nothing is drawn without its policy.",
        )
    try:
        read_policy(address[1], spec)
    except PolicyError as error:
        return Refusal(Reason.POLICY_MISSING, str(error))
    return None


def _upgrade(model: ImageModel, settings: OperatorSettings) -> Refusal | None:
    if model.spec.upgrade_strategy != "Incremental":
        return None
    if settings.models_tls is not None:
        return Refusal(
            Reason.INVALID_SPEC,
            "spec.upgradeStrategy is Incremental, which speaks plain HTTP to the model, but with "
            "the chart's value models.tls it speaks HTTPS: choose NewCluster or InPlaceOnly.",
        )
    if settings.gateway_class_name:
        return None
    return Refusal(
        Reason.INVALID_SPEC,
        "spec.upgradeStrategy is Incremental, which needs the Gateway API: set gatewayClassName "
        "in the chart's values, or choose NewCluster or InPlaceOnly.",
    )


def _fallback(address: Address, models: Mapping[Address, ImageModel]) -> Refusal | None:
    """A fallback that is missing, or that leads back to where it came from."""
    way = [address]
    while (following := _next(way[-1], models)) is not None:
        if following not in models:
            if len(way) > 1:
                return None  # the fault of another model, which says so itself
            return Refusal(
                Reason.FALLBACK_MISSING,
                f"spec.fallback names ImageModel {'/'.join(following)}, which does not exist: "
                "create it, or remove the fallback.",
            )
        if following == address:
            shown = " -> ".join("/".join(step) for step in [*way, following])
            return Refusal(
                Reason.REFERENCE_CYCLE,
                f"spec.fallback leads back to the model itself ({shown}): remove one of them.",
            )
        if following in way:
            return None  # a circle that others make, and that they report
        way.append(following)
    return None


def _next(address: Address, models: Mapping[Address, ImageModel]) -> Address | None:
    model = models.get(address)
    if model is None or model.spec.fallback is None:
        return None
    ref = model.spec.fallback.model_ref
    return (ref.namespace or address[0], ref.name)

"""gateway.json: what the gateway knows of models, adapters, policies and teams.

Pure builders. The gateway knows everything by one name; where two namespaces have a policy of one
name, the other one is called NAME.NAMESPACE, and whoever refers to it with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from calotype.operator.kube.labels import labels
from calotype.operator.kube.objects import Address, Manifest, Object
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel, LoRAAdapter, Team
from calotype.serving.wire.gateway_config import DeclaredTeam, GatewayConfig, ServedModel


@dataclass(frozen=True, slots=True)
class TeamEntry:
    """A team and the digests of its keys."""

    team: Team
    key_hashes: Sequence[str]
    refusal: str | None = None
    """Why it may not draw."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that requests may name."""

    manifest: Manifest
    url: str | None
    """None for a provider's model, and for one that was not deployed yet."""
    ready: bool


def policy_name(namespace: str, name: str, settings: OperatorSettings) -> str:
    """What a policy is called in gateway.json."""
    return name if namespace == settings.operator_namespace else f"{name}.{namespace}"


def build_gateway_config(
    models: Iterable[ModelEntry],
    adapters: Iterable[Manifest],
    policies: Mapping[Address, Object],
    teams: Iterable[TeamEntry],
    settings: OperatorSettings,
) -> GatewayConfig:
    """The document.

    Args:
        policies: (namespace, name) -> spec of a ModerationPolicy.
    """
    served = [
        ServedModel(
            manifest=ImageModel.model_validate(_renamed(entry.manifest, settings)),
            url=entry.url,
            ready=entry.ready,
        )
        for entry in models
    ]
    rendered = [LoRAAdapter.model_validate(_renamed(adapter, settings)) for adapter in adapters]
    return GatewayConfig(
        models=sorted(served, key=lambda entry: _address(entry.manifest)),
        adapters=sorted(rendered, key=_address),
        policies={
            policy_name(namespace, name, settings): dict(spec)
            for (namespace, name), spec in sorted(policies.items())
        },
        teams=sorted((_team(entry, settings) for entry in teams), key=lambda team: team.name),
    )


def build_config_map(config: GatewayConfig, settings: OperatorSettings) -> Manifest:
    """What is applied to the ConfigMap that the chart made; the chart's labels stay its own."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": settings.gateway_config,
            "namespace": settings.operator_namespace,
            "labels": {
                key: value
                for key, value in labels(settings, "gateway").items()
                if key == "app.kubernetes.io/part-of"
            },
        },
        "data": {"gateway.json": config.to_json()},
    }


def _team(entry: TeamEntry, settings: OperatorSettings) -> DeclaredTeam:
    spec = entry.team.spec
    namespace = entry.team.metadata.namespace
    ref = spec.moderation_policy_ref
    policy = None
    if ref is not None and entry.refusal is None:
        policy = policy_name(namespace, ref.name, settings)
    return DeclaredTeam(
        name=entry.team.name,
        namespace=namespace,
        display_name=spec.display_name or entry.team.name,
        weight=spec.weight,
        quotas=spec.quotas,
        models=list(spec.models),
        key_hashes=list(entry.key_hashes),
        refusal=entry.refusal,
        moderation_policy=policy,
    )


def _renamed(manifest: Manifest, settings: OperatorSettings) -> Manifest:
    """The manifest with its policy called as gateway.json calls it."""
    ref = manifest["spec"].get("moderationPolicyRef")
    if ref is None:
        return manifest
    name = policy_name(manifest["metadata"]["namespace"], ref["name"], settings)
    return {**manifest, "spec": {**manifest["spec"], "moderationPolicyRef": {"name": name}}}


def _address(resource: ImageModel | LoRAAdapter) -> Address:
    return resource.metadata.namespace, resource.name

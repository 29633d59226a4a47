"""gateway.json and teams.json: what the gateways know of models, adapters and teams.

Pure builders. The gateway knows everything by one name; a policy of another namespace than the
operator's is called NAME.NAMESPACE, and whoever refers to it with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calotype.operator.kube.labels import labels
from calotype.operator.kube.objects import Address, Manifest
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel, LoRAAdapter, Team
from calotype.serving.wire.document import Document
from calotype.serving.wire.gateway_config import GatewayConfig, ServedModel
from calotype.serving.wire.gateway_teams import DeclaredTeam, GatewayTeams


@dataclass(frozen=True, slots=True)
class TeamEntry:
    """A team within its grant, and the digests of its keys."""

    team: Team
    uid: str
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
    """What a policy is called outside of its namespace; one with a dot always has its namespace."""
    own = namespace == settings.operator_namespace and "." not in name
    return name if own else f"{name}.{namespace}"


def build_gateway_config(
    models: Iterable[ModelEntry], adapters: Iterable[Manifest], settings: OperatorSettings
) -> GatewayConfig:
    """gateway.json."""
    served = [
        ServedModel(
            manifest=ImageModel.model_validate(_renamed(entry.manifest, settings)),
            url=entry.url,
            ready=entry.ready,
        )
        for entry in models
    ]
    rendered = [LoRAAdapter.model_validate(_renamed(adapter, settings)) for adapter in adapters]
    served.sort(key=lambda entry: _address(entry.manifest))
    own = settings.operator_namespace
    default = settings.default_model or next(
        (m.manifest.name for m in served if m.manifest.metadata.namespace == own), None
    )
    return GatewayConfig(
        models=served,
        default_model=default,
        adapters=sorted(rendered, key=_address),
    )


def build_gateway_teams(teams: Iterable[TeamEntry], settings: OperatorSettings) -> GatewayTeams:
    """teams.json."""
    declared = (_team(entry, settings) for entry in teams)
    return GatewayTeams(teams=sorted(declared, key=lambda team: team.name))


def build_config_map(
    name: str, file: str, document: Document, settings: OperatorSettings
) -> Manifest:
    """What is applied to a ConfigMap that the chart made; the chart's labels stay its own."""
    part_of = "app.kubernetes.io/part-of"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "namespace": settings.operator_namespace,
            "labels": {part_of: labels(settings, "gateway")[part_of]},
        },
        "data": {file: document.to_json()},
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
        uid=entry.uid,
        takes_over=entry.team.name in settings.team_grant(namespace).takes,
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

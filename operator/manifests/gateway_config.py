"""gateway.json: what the gateway knows of models, adapters, policies and teams.

Pure builders. The gateway knows everything by one name; where two namespaces have a policy of one
name, the other one is called NAME.NAMESPACE, and whoever refers to it with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calotype.operator.kube.labels import labels
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import Team


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that requests may name."""

    manifest: Mapping[str, Any]
    url: str | None
    """None for a provider's model, which no pod of ours draws."""
    ready: bool


@dataclass(frozen=True, slots=True)
class TeamEntry:
    """A team and the digests of its keys."""

    team: Team
    key_hashes: Sequence[str]
    refusal: str = ""
    """Why it may not draw."""


def policy_name(namespace: str, name: str, settings: OperatorSettings) -> str:
    """What a policy is called in gateway.json."""
    return name if namespace == settings.operator_namespace else f"{name}.{namespace}"


def build_gateway_config(
    models: Iterable[ModelEntry],
    adapters: Iterable[Mapping[str, Any]],
    policies: Mapping[tuple[str, str], Mapping[str, Any]],
    teams: Iterable[TeamEntry],
    settings: OperatorSettings,
) -> dict[str, Any]:
    """The document.

    Args:
        policies: (namespace, name) -> spec of a ModerationPolicy.
    """
    return {
        "models": sorted(
            (
                {
                    "manifest": _renamed(entry.manifest, settings),
                    "url": entry.url,
                    "ready": entry.ready,
                }
                for entry in models
            ),
            key=lambda entry: _address(entry["manifest"]),
        ),
        "adapters": sorted((_renamed(a, settings) for a in adapters), key=_address),
        "policies": {
            policy_name(namespace, name, settings): dict(spec)
            for (namespace, name), spec in sorted(policies.items())
        },
        "teams": sorted((_team(entry, settings) for entry in teams), key=lambda t: str(t["name"])),
    }


def build_config_map(document: Mapping[str, Any], settings: OperatorSettings) -> dict[str, Any]:
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
        "data": {"gateway.json": json.dumps(document, separators=(",", ":"))},
    }


def _team(entry: TeamEntry, settings: OperatorSettings) -> dict[str, Any]:
    spec = entry.team.spec
    namespace = entry.team.metadata.namespace
    found: dict[str, Any] = {
        "name": entry.team.name,
        "namespace": namespace,
        "displayName": spec.display_name or entry.team.name,
        "weight": spec.weight,
        "quotas": spec.quotas.model_dump(mode="json", by_alias=True, exclude_none=True),
        "models": list(spec.models),
        "keyHashes": list(entry.key_hashes),
    }
    if entry.refusal:
        found["refusal"] = entry.refusal
    elif spec.moderation_policy_ref is not None:
        found["moderationPolicy"] = policy_name(
            namespace, spec.moderation_policy_ref.name, settings
        )
    return found


def _renamed(manifest: Mapping[str, Any], settings: OperatorSettings) -> dict[str, Any]:
    """The manifest with its policy called as gateway.json calls it."""
    ref = manifest["spec"].get("moderationPolicyRef")
    if ref is None:
        return dict(manifest)
    name = policy_name(manifest["metadata"]["namespace"], ref["name"], settings)
    return {**manifest, "spec": {**manifest["spec"], "moderationPolicyRef": {"name": name}}}


def _address(manifest: Mapping[str, Any]) -> tuple[str, str]:
    return manifest["metadata"]["namespace"], manifest["metadata"]["name"]

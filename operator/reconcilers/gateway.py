"""All models and adapters -> gateway.json; all teams -> teams.json.

Two objects: what is wrong with the models' configuration keeps no key valid that was revoked.
"""

from __future__ import annotations

from calotype.operator.api.conditions import Condition, is_true
from calotype.operator.kube.labels import owned_by
from calotype.operator.kube.objects import Address, Manifest
from calotype.operator.kube.resources import CONFIG_MAPS, SECRETS
from calotype.operator.manifests.custom_resources import model_manifest
from calotype.operator.manifests.gateway_config import (
    ModelEntry,
    TeamEntry,
    build_config_map,
    build_gateway_config,
    build_gateway_teams,
)
from calotype.operator.manifests.team_key import key_hash, key_of, secret_name
from calotype.operator.planning.model_check import UNKNOWN_TO_GATEWAYS
from calotype.operator.planning.team_check import team_refusal
from calotype.operator.planning.weights import plan_weights
from calotype.operator.reconcilers.workload import is_deployed, service_of
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.served_adapters import for_gateway
from calotype.operator.runtime.workqueue import Key
from calotype.serving.config import ImageModel
from calotype.serving.wire.document import Document


async def reconcile_gateway(context: Context, key: Key) -> float | None:
    """Writes gateway.json where it says something else than it should."""
    settings = context.settings
    models, adapters = [], []
    for address, host in context.store.hosts().items():
        obj = context.store.get("ImageModel", address)
        if obj is None or "deletionTimestamp" in obj["metadata"]:
            continue
        if host.refusal is not None and host.refusal.reason in UNKNOWN_TO_GATEWAYS:
            continue
        models.append(_entry(context, address, host.model, obj))
        adapters += for_gateway(context, address, host.model)
    config = build_gateway_config(models, adapters, settings)
    await _write(context, settings.gateway_config, "gateway.json", config)
    return None


async def reconcile_gateway_teams(context: Context, key: Key) -> float | None:
    """Writes teams.json where it says something else than it should."""
    settings = context.settings
    teams = build_gateway_teams(await _teams(context), settings)
    await _write(context, settings.gateway_teams, "teams.json", teams)
    return None


async def _write(context: Context, name: str, file: str, document: Document) -> None:
    wanted = build_config_map(name, file, document, context.settings)
    namespace = context.settings.operator_namespace
    live = await context.kube.get(CONFIG_MAPS, namespace, name)
    drifted = live is not None and live.get("data") != wanted["data"]
    if await context.children.apply(wanted, live, force=drifted):
        context.metrics.pushes.labels(namespace, file.removesuffix(".json")).inc()


def _entry(context: Context, address: Address, model: ImageModel, obj: Manifest) -> ModelEntry:
    plan = plan_weights(model, obj["status"])
    manifest = model_manifest(model, plan.ready)
    policy = context.store.policy_of(model)
    if policy is not None:
        manifest["spec"]["moderationPolicyRef"] = {"name": policy.name}
    url = context.apps.url(service_of(model), address[0]) if is_deployed(obj) else None
    condition = Condition.READY if _provider(model) else Condition.SERVING
    return ModelEntry(manifest, url, is_true(obj, condition))


def _provider(model: ImageModel) -> bool:
    return model.spec.source.provider is not None


async def _teams(context: Context) -> list[TeamEntry]:
    found: list[TeamEntry] = []
    declared = context.store.declared()
    for address, team in declared.specs.items():
        obj = declared.teams[address]
        if "deletionTimestamp" in obj["metadata"] or address in declared.refusals:
            continue
        secret = await context.kube.get(SECRETS, address[0], secret_name(team.name))
        key = key_of(secret) if secret is not None and owned_by(secret, obj) else None
        refusal = team_refusal(declared, address, team)
        hashes = [key_hash(key)] if key is not None else []
        reason = refusal.message if refusal is not None else None
        found.append(TeamEntry(team, obj["metadata"]["uid"], hashes, reason))
    return found

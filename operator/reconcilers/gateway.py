"""All models, adapters, policies and teams -> gateway.json."""

from __future__ import annotations

from calotype.operator.api.conditions import Condition, Reason, is_true
from calotype.operator.kube.labels import owned_by
from calotype.operator.kube.objects import Address, Manifest, Object
from calotype.operator.kube.resources import CONFIG_MAPS, SECRETS
from calotype.operator.manifests.custom_resources import InvalidSpec, model_manifest, parse
from calotype.operator.manifests.gateway_config import (
    ModelEntry,
    TeamEntry,
    build_config_map,
    build_gateway_config,
)
from calotype.operator.manifests.team_key import key_hash, key_of, secret_name
from calotype.operator.planning.team_check import team_refusal
from calotype.operator.planning.weights import plan_weights
from calotype.operator.reconcilers.workload import is_deployed, service_of
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.served_adapters import for_gateway
from calotype.operator.runtime.workqueue import Key
from calotype.serving.config import ImageModel, Team


async def reconcile_gateway(context: Context, key: Key) -> float | None:
    """Writes gateway.json where it says something else than it should."""
    settings = context.settings
    models, adapters = [], []
    for address, host in context.store.hosts().items():
        obj = context.store.get("ImageModel", address)
        if obj is None or "deletionTimestamp" in obj["metadata"]:
            continue
        if host.refusal is not None and host.refusal.reason == Reason.NAME_CONFLICT:
            continue  # the name is another model's
        models.append(_entry(context, address, host.model, obj))
        adapters += for_gateway(context, address, host.model)
    config = build_gateway_config(
        models, adapters, _policies(context), await _teams(context), settings
    )
    wanted = build_config_map(config, settings)
    live = await context.kube.get(CONFIG_MAPS, settings.operator_namespace, settings.gateway_config)
    force = live is not None and live.get("data") != wanted["data"]
    if await context.children.apply(wanted, live, force=force):
        context.metrics.pushes.labels(settings.operator_namespace, "gateway").inc()
    return None


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


def _policies(context: Context) -> dict[Address, Object]:
    """The valid ones."""
    return {
        address: obj["spec"]
        for address, obj in context.store.all("ModerationPolicy")
        if "deletionTimestamp" not in obj["metadata"] and is_true(obj, Condition.ACCEPTED)
    }


async def _teams(context: Context) -> list[TeamEntry]:
    found: list[TeamEntry] = []
    names: dict[str, str] = {}
    declared = context.store.declared()
    teams = [
        (obj["metadata"].get("creationTimestamp") or "", address, obj)
        for address, obj in context.store.all("Team")
        if "deletionTimestamp" not in obj["metadata"]
    ]
    for _, address, obj in sorted(teams, key=lambda entry: entry[:2]):
        if names.setdefault(address[1], address[0]) != address[0]:
            continue  # the older Team of that name has it
        try:
            team = parse(Team, obj)
        except InvalidSpec:
            continue
        secret = await context.kube.get(SECRETS, address[0], secret_name(team.name))
        key = key_of(secret) if secret is not None and owned_by(secret, obj) else None
        refusal = team_refusal(declared, address, team)
        hashes = [key_hash(key)] if key is not None else []
        found.append(TeamEntry(team, hashes, refusal.message if refusal is not None else None))
    return found

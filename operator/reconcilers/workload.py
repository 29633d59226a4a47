"""The workload of a model: a Deployment of one pod, or a RayService."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from calotype.operator.api.conditions import (
    Condition,
    Fact,
    Reason,
    condition_of,
    false,
    recorded_facts,
    true,
)
from calotype.operator.kube.client import JSON_PATCH, ApiError
from calotype.operator.kube.labels import CLUSTER_HASH, MODEL, owned_by, workload_name
from calotype.operator.kube.objects import Manifest, Object, address_of
from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    POD_MONITORS,
    RAY_CLUSTERS,
    RAY_SERVICES,
    Resource,
)
from calotype.operator.manifests import rayservice, singlepod
from calotype.operator.manifests.application import (
    ServeApplication,
    build_application,
    config_hash,
    generator_config,
    serve_config,
)
from calotype.operator.manifests.custom_resources import Weights, model_manifest
from calotype.operator.manifests.model_secret import build_model_secret
from calotype.operator.manifests.podmonitor import build_podmonitor
from calotype.operator.manifests.pods import Volumes
from calotype.operator.planning.team_check import policies_beside
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.workqueue import Postponed
from calotype.operator.runtime.writers.children import NotOurs
from calotype.operator.settings import ResourceProfile
from calotype.serving.config import ImageModel
from calotype.serving.wire.application import ModeratorConfig, NamedPolicy

Adapters = Sequence[Object]


@dataclass(frozen=True, slots=True)
class Workload:
    """The workload of a model as it was found or applied."""

    possible: bool = True
    """False while RayService is not installed."""
    live: Object | None = None
    config: Object | None = None
    """The application as it was written last."""
    config_object: Object | None = None
    """The ConfigMap that holds it, of a SinglePod."""
    selector: str | None = None
    upgrade: Fact | None = None
    again: float | None = None
    adapters: Adapters = field(default_factory=tuple)

    @property
    def config_hash(self) -> str:
        return config_hash(self.config) if self.config is not None else ""


def service_of(model: ImageModel) -> str:
    """The Service that the gateway and the operator speak to."""
    if model.spec.runtime == "SinglePod":
        return workload_name(model.name)
    return rayservice.service_name(model.name)


def is_deployed(obj: Object) -> bool:
    """Whether the Service of a model is known to be the model's.

    Nobody may speak to it before: it could be somebody else's, and would hear the internal token.
    """
    accepted = condition_of(obj, Condition.ACCEPTED)
    blocked = accepted is not None and accepted["reason"] == Reason.OBJECT_NOT_OURS
    return not blocked and bool((obj.get("status") or {}).get("configHash"))


async def read_workload(context: Context, obj: Object, model: ImageModel) -> Workload:
    """The workload as it is in the cluster.

    Raises:
        NotOurs: somebody else has an object that the model needs for itself.
    """
    name = workload_name(model.name)
    if model.spec.runtime == "SinglePod":
        live = await _own(context, obj, DEPLOYMENTS, name)
        config_map = await _own(context, obj, CONFIG_MAPS, singlepod.config_map_name(model.name))
        config = _json(((config_map or {}).get("data") or {}).get("model.json"))
        pod_labels = singlepod.selector(context.settings, model.name)
        return Workload(
            live=live,
            config=config,
            config_object=config_map,
            selector=_selector(pod_labels),
            adapters=_adapters(config),
        )
    live = await _own(context, obj, RAY_SERVICES, name)
    if live is None and not await context.kube.serves(RAY_SERVICES):
        return Workload(possible=False, again=context.settings.status_poll_seconds * 3)
    text = ((live or {}).get("spec") or {}).get("serveConfigV2")
    config = ((_json(text) or {}).get("applications") or [None])[0]
    return Workload(
        live=live,
        config=config,
        selector=_selector({MODEL: model.name, "ray.io/group": "generator"}),
        adapters=_adapters(config),
    )


async def _own(context: Context, obj: Object, resource: Resource, name: str) -> Manifest | None:
    """An object that was made for the custom resource ``obj``, in its namespace."""
    namespace = obj["metadata"]["namespace"]
    found = await context.kube.get(resource, namespace, name)
    if found is not None and not owned_by(found, obj):
        raise NotOurs(resource.kind, namespace, name)
    return found


async def apply_workload(
    context: Context,
    obj: Object,
    model: ImageModel,
    weights: Weights | None,
    adapters: Adapters,
    volumes: Volumes,
    seen: Workload,
    force: bool,
) -> Workload:
    """Creates the workload, or changes it where it differs."""
    if not seen.possible:
        return seen
    settings = context.settings
    profile = settings.profile(model.spec.resource_profile)
    if profile is None:
        return seen
    encoder = _encoder_profile(context, model)
    policy = context.store.policy_of(model)
    single = model.spec.runtime == "SinglePod"
    application = build_application(
        model,
        model_manifest(model, weights),
        adapters,
        ModeratorConfig(
            policy=NamedPolicy(name=policy.name, spec=dict(policy.spec)) if policy else None,
            policies=policies_beside(context.store.declared(), model, adapters),
        ),
        profile,
        encoder,
        groups=not single,
        max_outage_seconds=settings.max_outage_seconds,
    )
    await _access(context, obj, force)
    if application != seen.config:
        context.metrics.pushes.labels(model.metadata.namespace, model.name).inc()
    if single:
        result = await _single_pod(context, obj, model, application, profile, volumes, seen, force)
    else:
        groups = rayservice.groups_of(model, profile, encoder)
        result = await _ray_service(context, obj, model, application, groups, volumes, seen, force)
    return replace(result, config=cast(Object, application), adapters=adapters)


async def _access(context: Context, obj: Object, force: bool) -> None:
    """The Secret by which the pods reach their jobs; another one after another internal token."""
    token = await context.apps.internal_token()
    if not token:
        return
    wanted = build_model_secret(obj, token, context.settings)
    await context.children.ensure(wanted, force=force)


async def _single_pod(
    context: Context,
    obj: Object,
    model: ImageModel,
    application: ServeApplication,
    profile: ResourceProfile,
    volumes: Volumes,
    seen: Workload,
    force: bool,
) -> Workload:
    settings = context.settings
    config = singlepod.build_config(obj, application, settings)
    await context.children.apply(config, seen.config_object, force=force)
    await context.children.ensure(singlepod.build_service(obj, settings), force=force)
    wanted = singlepod.build_deployment(
        obj, profile, volumes, settings, suspended=model.spec.suspend
    )
    live = seen.live
    if await context.children.apply(wanted, live, force=force):
        live = await _own(context, obj, DEPLOYMENTS, workload_name(model.name))
    await _monitor(context, obj, model, force)
    return replace(seen, live=live)


async def _ray_service(
    context: Context,
    obj: Object,
    model: ImageModel,
    application: ServeApplication,
    groups: Sequence[rayservice.Group],
    volumes: Volumes,
    seen: Workload,
    force: bool,
) -> Workload:
    settings, live = context.settings, seen.live
    cluster = rayservice.build_cluster(model.name, groups, volumes, settings)
    clusters = await _clusters(context, live)
    upgrade = _upgrade(model, live, cluster, clusters)
    kept: Object | None = None
    if live is not None and upgrade.reason == Reason.HELD_BACK:
        kept = _with_bounds(live["spec"]["rayClusterConfig"], cluster)
    text = serve_config(application, tls=rayservice.has_certificate(kept or cluster))
    if upgrade.holds and not _is_recorded(obj, upgrade):
        # Before it is applied, so that whoever watches the status sees it first.
        await _announce(context, obj, upgrade)
    if live is not None and _timed_out(live):
        await context.kube.delete(RAY_SERVICES, *address_of(live), live["metadata"]["uid"])
        await context.events.post(
            obj,
            "Warning",
            Reason.INITIALIZING_TIMEOUT,
            "The RayService gave up initializing, which is for good; it is made anew.",
        )
        raise Postponed(2.0, "the RayService is made anew")
    wanted = rayservice.build_rayservice(obj, model, groups, text, volumes, settings, cluster=kept)
    drifted = live is not None and live["spec"].get("serveConfigV2") != text
    if await context.children.apply(wanted, live, force=force or drifted):
        live = await _own(context, obj, RAY_SERVICES, workload_name(model.name))
    for running in clusters:
        await _patch_bounds(context, running, kept or cluster)
    await _monitor(context, obj, model, force)
    return replace(seen, live=live, upgrade=upgrade)


async def _patch_bounds(context: Context, running: Object, cluster: Object) -> None:
    """KubeRay does not hand changed replica bounds to a running cluster; we do."""
    patch = rayservice.replica_patch(running, cluster)
    if patch is None:
        return
    metadata = running["metadata"]
    try:
        await context.kube.patch(
            RAY_CLUSTERS, metadata["namespace"], metadata["name"], patch, JSON_PATCH
        )
    except ApiError as error:
        if error.status in (409, 422):
            raise Postponed(1.0, f"RayCluster {metadata['name']} changed meanwhile") from error
        raise
    context.metrics.writes.labels("RayCluster", "patch").inc()


async def _clusters(context: Context, service: Object | None) -> list[Manifest]:
    """The RayClusters that KubeRay made of the RayService."""
    if service is None:
        return []
    namespace, name = address_of(service)
    found = await context.kube.list(
        RAY_CLUSTERS,
        namespace,
        {"ray.io/originated-from-cr-name": name, "ray.io/originated-from-crd": "RayService"},
    )
    return [
        cluster
        for cluster in found
        if "deletionTimestamp" not in cluster["metadata"] and owned_by(cluster, service)
    ]


def _upgrade(
    model: ImageModel,
    live: Object | None,
    cluster: Object,
    clusters: Sequence[Object],
) -> Fact:
    """Whether what the manifest asks for needs a second cluster, and what follows."""
    type_ = Condition.UPGRADE_PLANNED
    if live is None or model.spec.suspend:
        return false(type_, Reason.NO_UPGRADE, "Running pods can take the manifest as it is.")
    had = (live["metadata"].get("annotations") or {}).get(CLUSTER_HASH)
    if had == rayservice.cluster_hash(cluster):
        conditions = (live.get("status") or {}).get("conditions") or ()
        if any(c["type"] == "UpgradeInProgress" and c["status"] == "True" for c in conditions):
            return true(type_, Reason.NEW_CLUSTER, _needs(model, cluster, clusters))
        return false(type_, Reason.NO_UPGRADE, "Running pods can take the manifest as it is.")
    if model.spec.upgrade_strategy == "InPlaceOnly":
        return true(
            type_,
            Reason.HELD_BACK,
            "The change needs new pods, which upgradeStrategy InPlaceOnly does not make: set "
            "spec.suspend to true and to false again when nobody needs the model, or choose "
            "NewCluster.",
        )
    return true(type_, Reason.NEW_CLUSTER, _needs(model, cluster, clusters))


def _needs(model: ImageModel, cluster: Object, clusters: Sequence[Object]) -> str:
    running = clusters[0]["spec"] if clusters else {}
    now = {g["groupName"]: g.get("replicas") for g in running.get("workerGroupSpecs", [])}
    groups = [
        {**group, "replicas": now.get(group["groupName"]) or group["replicas"]}
        for group in cluster["workerGroupSpecs"]
    ]
    gpus = rayservice.gpus_of({"workerGroupSpecs": groups})
    shown = " and ".join(f"{count} {name}" for name, count in sorted(gpus.items())) or "no GPU"
    how = (
        "they are taken by and by, while traffic moves over"
        if model.spec.upgrade_strategy == "Incremental"
        else "the old cluster serves until the new one is ready, and ends then"
    )
    return (
        f"The change needs a second Ray cluster, that is {shown} beside the present ones until it "
        f"has taken over; upgradeStrategy {model.spec.upgrade_strategy}: {how}."
    )


def _is_recorded(obj: Object, fact: Fact) -> bool:
    old = condition_of(obj, fact.type)
    return old is not None and (old["status"], old["reason"]) == (fact.status, fact.reason)


async def _announce(context: Context, obj: Object, fact: Fact) -> None:
    status = obj.get("status") or {}
    facts = recorded_facts(obj, fact.type)
    fields = {k: v for k, v in status.items() if k not in ("conditions", "observedGeneration")}
    await context.statuses.write(obj, [*facts, fact], fields)


def _with_bounds(kept: Object, wanted: Object) -> Manifest:
    """The running cluster's spec with the new bounds of replicas, which change no pod."""
    bounds = {group["groupName"]: group for group in wanted["workerGroupSpecs"]}
    groups = []
    for group in kept.get("workerGroupSpecs", []):
        bound = bounds.get(group["groupName"], group)
        fields = ("replicas", "minReplicas", "maxReplicas")
        groups.append({**group, **{f: bound[f] for f in fields if f in bound}})
    return {**kept, "workerGroupSpecs": groups}


def _timed_out(live: Object) -> bool:
    conditions = (live.get("status") or {}).get("conditions") or ()
    return any(c.get("reason") == "InitializingTimeout" for c in conditions)


async def _monitor(context: Context, obj: Object, model: ImageModel, force: bool) -> None:
    """A PodMonitor where Prometheus' operator is installed; that is checked at every resync."""
    installed = context.monitors_installed
    if installed is None or force:
        installed = context.monitors_installed = await context.kube.serves(POD_MONITORS)
    if not installed:
        return
    await context.children.ensure(build_podmonitor(obj, model, context.settings), force=force)


def _encoder_profile(context: Context, model: ImageModel) -> ResourceProfile | None:
    encoder = model.spec.text_encoder
    if encoder is None:
        return None
    return context.settings.profile(encoder.resource_profile or model.spec.resource_profile)


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _adapters(config: Object | None) -> Adapters:
    return tuple(generator_config(config or {}).get("adapters") or ())


def names_of(adapters: Adapters) -> frozenset[str]:
    """The names of rendered adapters."""
    return frozenset(str(adapter["metadata"]["name"]) for adapter in adapters)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError:
        return None  # somebody wrote something else there; it is written again

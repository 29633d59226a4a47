"""ImageModel -> a running service."""

from __future__ import annotations

from collections.abc import Sequence

from calotype.operator.api.conditions import (
    Condition,
    Fact,
    Reason,
    false,
    recorded_facts,
    true,
)
from calotype.operator.kube.objects import Manifest, Object, address_of
from calotype.operator.kube.resources import CLAIMS, IMAGE_MODELS
from calotype.operator.manifests.custom_resources import InvalidSpec, parse
from calotype.operator.manifests.pods import Volumes
from calotype.operator.planning.claims import volume_problem, waiting
from calotype.operator.planning.fetch_step import FetchStep, failure_field, last_failure
from calotype.operator.planning.model_report import queue_field
from calotype.operator.planning.model_status import ModelObservation, facts_of, phase_of
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.weights import (
    WeightsPlan,
    build_claim,
    claim_name,
    fetch_task,
    is_fetched,
    plan_weights,
    source_hash,
    source_json,
    volumes_of,
)
from calotype.operator.reconcilers.former_names import delete_former_workload
from calotype.operator.reconcilers.model_deletion import finish_model, forget_model
from calotype.operator.reconcilers.report import first_report
from calotype.operator.reconcilers.workload import (
    Workload,
    apply_workload,
    names_of,
    read_workload,
    service_of,
)
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.credentials import Credentials
from calotype.operator.runtime.served_adapters import for_replicas
from calotype.operator.runtime.workqueue import Key
from calotype.operator.runtime.writers.children import NotOurs
from calotype.serving.config import ImageModel, credential_keys


async def reconcile_model(context: Context, key: Key) -> float | None:
    """One look at one model."""
    address = (key.namespace, key.name)
    obj = await context.kube.get(IMAGE_MODELS, *address)
    if obj is None:
        forget_model(context, address)
        return None
    if "deletionTimestamp" in obj["metadata"]:
        return await finish_model(context, obj)
    try:
        model = parse(ImageModel, obj)
    except InvalidSpec as error:
        fact = false(Condition.ACCEPTED, Reason.INVALID_SPEC, str(error))
        ready = false(Condition.READY, Reason.INVALID_SPEC, str(error))
        await context.statuses.write(obj, [fact, ready], {**_kept(obj), "phase": "Failed"})
        return None
    if model.spec.source.provider is not None:
        return await _provider(context, obj, model)
    await context.finalizers.add(IMAGE_MODELS, obj)
    try:
        return await _serve(context, key, obj, model)
    except NotOurs as error:
        return await _blocked(context, obj, model, Refusal(Reason.OBJECT_NOT_OURS, str(error)))


async def _serve(context: Context, key: Key, obj: Manifest, model: ImageModel) -> float | None:
    address = (key.namespace, key.name)
    force = key in context.recheck
    context.recheck.discard(key)
    host = context.store.hosts().get(address)
    refusal = host.refusal if host is not None else None
    credentials = await _credentials(context, model)
    if credentials.ready:
        credentials = await _certificate(context, model) or credentials
    volumes = volumes_of(model, context.settings)
    accepted = refusal is None
    problem, unbound = await _claim(context, obj, model, volumes, accepted, force)
    weights = plan_weights(model, obj.get("status") or {})
    step: FetchStep | None = None
    if weights.to_fetch and accepted and credentials.ready and volumes.keeps_weights:
        step = await _fetch(context, key, obj, model, credentials, volumes)
        if step.fetched is not None:
            weights = plan_weights(model, obj["status"])
    if not weights.to_fetch and context.fetch_jobs.get(key):
        # An operator was killed between writing the result down and deleting the Job.
        await context.fetches.clean(obj, model.metadata.namespace, "model", model.name)
    seen = await read_workload(context, obj, model)
    if accepted and _may_start(weights, volumes, seen, problem):
        seen = await _deploy(context, obj, model, weights, volumes, seen, force)
    if seen.live is not None and not model.spec.suspend:
        await first_report(context, address, model)
    context.pushed.setdefault(address, names_of(seen.adapters))
    report = context.reports.get(address)
    observed = ModelObservation(
        model=model,
        refusal=refusal,
        credentials=credentials.fact,
        weights=weights,
        volumes=volumes,
        volume_problem=problem,
        fetch=step,
        kuberay=seen.possible,
        workload=seen.live,
        report=report,
        config_hash=seen.config_hash,
        upgrade=seen.upgrade,
        rivals=host.rivals if host is not None else None,
    )
    facts = facts_of(observed)
    await context.statuses.write(
        obj, facts, _fields(context, obj, model, observed, seen, step, facts)
    )
    if any(fact.type == Condition.READY and fact.holds for fact in facts) or (
        model.spec.suspend and seen.live is not None
    ):
        await delete_former_workload(context, obj)
    context.queue.add(Key("Report", *address))
    context.wake_gateway()
    waits = [step.again if step is not None else None, seen.again, _debounced(context, key)]
    if not credentials.ready or problem is not None or refusal is not None or unbound:
        waits.append(context.settings.secret_poll_seconds)
    return min((wait for wait in waits if wait is not None), default=_poll(context, facts))


async def _blocked(context: Context, obj: Manifest, model: ImageModel, refusal: Refusal) -> float:
    """Says why nothing of the model is made or changed; what was made before goes on."""
    address = address_of(obj)
    context.reports.pop(address, None)
    observed = ModelObservation(
        model=model,
        refusal=refusal,
        credentials=(await _credentials(context, model)).fact,
        weights=plan_weights(model, obj.get("status") or {}),
        volumes=volumes_of(model, context.settings),
    )
    facts = facts_of(observed)
    await context.statuses.write(obj, facts, {**_kept(obj), "phase": phase_of(model, facts)})
    context.wake_gateway()
    return context.settings.secret_poll_seconds


def _poll(context: Context, facts: list[Fact]) -> float:
    settled = all(f.holds for f in facts if f.type in (Condition.READY, Condition.SERVING))
    return context.settings.status_poll_seconds * (3 if settled else 1)


def _debounced(context: Context, key: Key) -> float | None:
    return context.debounce.remaining(key) or None


def _may_start(
    weights: WeightsPlan, volumes: Volumes, seen: Workload, problem: Fact | None
) -> bool:
    """A pod without its weights would occupy a GPU and wait."""
    if seen.live is None and problem is not None and problem.reason == Reason.VOLUME_MISSING:
        return False
    return weights.ready is not None or weights.current


async def _credentials(context: Context, model: ImageModel) -> Credentials:
    ref = model.spec.credentials_secret_ref
    return await context.credentials.check(
        model.metadata.namespace,
        ref.name if ref is not None else None,
        credential_keys(model.spec.source),
    )


async def _certificate(context: Context, model: ImageModel) -> Credentials | None:
    """What is wrong with the Secret of TLS, without which no pod starts; None = nothing."""
    tls = context.settings.models_tls
    if tls is None:
        return None
    keys = ("tls.crt", "tls.key", "ca.crt")
    namespace, named = model.metadata.namespace, "the chart's value models.tls"
    found = await context.credentials.check(namespace, tls.secret, keys, named)
    return None if found.ready else found


async def _claim(
    context: Context,
    obj: Object,
    model: ImageModel,
    volumes: Volumes,
    accepted: bool,
    force: bool,
) -> tuple[Fact | None, bool]:
    """Makes the cache's claim; returns what is wrong with the volumes, if anything is, and whether
    one is not there yet."""
    if is_fetched(model.spec.source) and not volumes.keeps_weights:
        nowhere = false(
            Condition.WEIGHTS_CACHED,
            Reason.VOLUME_MISSING,
            "There is nowhere to keep what is fetched: give spec.cache.persistentVolumeClaim a "
            "size, or install the chart with a volume of its own.",
        )
        return nowhere, False
    claims: dict[str, Manifest | None] = {}
    for name in filter(None, (volumes.cache, volumes.source)):
        claims[name] = await context.kube.get(CLAIMS, model.metadata.namespace, name)
    wanted = build_claim(obj, model, context.settings)
    if wanted is not None and accepted:
        name = claim_name(model.name)
        if await context.children.apply(wanted, claims[name], force=force):
            claims[name] = await context.kube.get(CLAIMS, model.metadata.namespace, name)
    problem = volume_problem(claims, context.kube.now(), context.settings)
    return problem, waiting(claims.values())


async def _fetch(
    context: Context,
    key: Key,
    obj: Manifest,
    model: ImageModel,
    credentials: Credentials,
    volumes: Volumes,
) -> FetchStep:
    """One step of the fetch; what it found is in ``obj``'s status afterwards."""
    status = obj.get("status") or {}
    step = await context.fetches.step(
        key,
        lambda attempt: fetch_task(obj, model, credentials.version, attempt),
        last_failure(status),
        volumes,
        credentials.secret,
    )
    if step.fetched is not None:
        found = step.fetched
        fields = {
            **_kept(obj),
            "resolvedRevision": found.revision,
            "weightsSha256": found.sha256,
            "weightsPath": found.path,
            "weightsBytes": found.size_bytes,
            "sourceHash": source_hash(source_json(model.spec.source)),
        }
        # Written down before anything is done with it: the Job may be gone at the next look.
        fact = true(Condition.WEIGHTS_CACHED, Reason.FETCHED, f"Revision {found.revision}.")
        await context.statuses.write(obj, [*recorded_facts(obj, fact.type), fact], fields)
        fresh = await context.kube.get(IMAGE_MODELS, *address_of(obj))
        obj["status"] = (fresh or {}).get("status") or {**status, **fields}
        await context.fetches.clean(obj, model.metadata.namespace, "model", model.name)
        for adapter in context.store.adapters_of(address_of(obj)):
            context.wake_adapter(adapter, 1.0)  # they are checked against it
    return step


async def _deploy(
    context: Context,
    obj: Manifest,
    model: ImageModel,
    weights: WeightsPlan,
    volumes: Volumes,
    seen: Workload,
    force: bool,
) -> Workload:
    key = Key("ImageModel", *address_of(obj))
    wait = context.debounce.remaining(key)
    if wait > 0 and seen.live is not None:
        adapters: Sequence[Object] = (
            seen.adapters
        )  # as they are, until the burst of changes is over
    else:
        adapters = for_replicas(context, address_of(obj), model)
        context.debounce.clear(key)
    seen = await apply_workload(context, obj, model, weights.ready, adapters, volumes, seen, force)
    names = names_of(adapters)
    if context.pushed.get(address_of(obj)) != names:
        context.pushed[address_of(obj)] = names
        for address in context.store.adapters_of(address_of(obj)):
            context.wake_adapter(address)
    return seen


async def _provider(context: Context, obj: Manifest, model: ImageModel) -> float | None:
    """A model that another company draws: its key is checked, and that is all."""
    await context.finalizers.remove(IMAGE_MODELS, obj)
    host = context.store.hosts().get(address_of(obj))
    credentials = await _credentials(context, model)
    if model.spec.credentials_secret_ref is None:
        missing = false(
            Condition.CREDENTIALS_READY,
            Reason.SECRET_MISSING,
            "A provider wants an API key: name a Secret with API_KEY in spec.credentialsSecretRef.",
        )
        credentials = Credentials(missing)
    seen = ModelObservation(
        model=model,
        refusal=host.refusal if host is not None else None,
        credentials=credentials.fact,
        weights=plan_weights(model, {}),
        volumes=Volumes(),
    )
    facts = facts_of(seen)
    await context.statuses.write(obj, facts, {"phase": phase_of(model, facts)})
    context.wake_gateway()
    poll = context.settings.secret_poll_seconds
    return poll if not credentials.ready else max(poll, context.settings.resync_seconds / 4)


# --- status -------------------------------------------------------------------------------------

_KEPT = (
    "resolvedRevision",
    "weightsSha256",
    "weightsPath",
    "weightsBytes",
    "sourceHash",
    "lastFailure",
    "configHash",
)


def _kept(obj: Object) -> Manifest:
    """What of the status is our memory and not an observation."""
    status = obj.get("status") or {}
    return {name: status[name] for name in _KEPT if name in status}


def _fields(
    context: Context,
    obj: Object,
    model: ImageModel,
    seen: ModelObservation,
    running: Workload,
    step: FetchStep | None,
    facts: list[Fact],
) -> Manifest:
    address = (model.metadata.namespace, model.name)
    report = seen.report
    ready = report.ready_replicas if report is not None else 0
    desired = report.replicas if report is not None and report.reachable else ready
    names = context.pushed.get(address) or frozenset()
    loaded = report.loaded_everywhere(names) if report is not None else 0
    profile = context.settings.profile(model.spec.resource_profile)
    cost = profile.hour_cost * desired if profile is not None else 0.0
    failure = failure_field(step.failure) if step is not None else None
    return {
        **_kept(obj),
        "lastFailure": failure or _kept(obj).get("lastFailure"),
        "phase": phase_of(model, facts),
        "url": context.apps.url(service_of(model), model.metadata.namespace),
        "replicas": {"ready": ready, "desired": desired, "max": model.spec.replicas.max},
        "serving": f"{ready}/{desired}",
        "selector": running.selector,
        "adapters": {"loaded": loaded, "desired": len(names)},
        "configHash": running.config_hash or None,
        "queueSeconds": queue_field(report, (obj.get("status") or {}).get("queueSeconds")),
        "gpuHourCost": cost or None,
    }

"""LoRAAdapter -> loaded everywhere."""

from __future__ import annotations

from dataclasses import replace

from calotype.operator.api.conditions import (
    Condition,
    Fact,
    Reason,
    condition_of,
    false,
    is_true,
    recorded_facts,
    true,
)
from calotype.operator.kube.objects import Address, Manifest, address_of
from calotype.operator.kube.resources import CLAIMS, LORA_ADAPTERS
from calotype.operator.manifests.custom_resources import InvalidSpec, model_manifest, parse
from calotype.operator.manifests.fetch_job import FetchTask
from calotype.operator.manifests.pods import Volumes
from calotype.operator.planning.adapter_status import (
    AdapterObservation,
    adapter_facts,
    adapter_fields,
    adapter_phase,
)
from calotype.operator.planning.adapters import (
    LoadSummary,
    adapter_task,
    candidate_model,
    summarise,
)
from calotype.operator.planning.claims import volume_problem
from calotype.operator.planning.fetch_step import FetchStep, last_failure
from calotype.operator.planning.weights import (
    AdapterWeights,
    plan_adapter_weights,
    plan_weights,
    source_type,
    volumes_of,
)
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.credentials import Credentials
from calotype.operator.runtime.served_adapters import refusal_of
from calotype.operator.runtime.workqueue import Key
from calotype.operator.runtime.writers.children import NotOurs
from calotype.serving.config import CREDENTIAL_KEYS, ImageModel, LoRAAdapter

UNKNOWN_SECONDS = 0.5
"""Between two looks while the model has not been asked yet."""


async def reconcile_adapter(context: Context, key: Key) -> float | None:
    """One look at one adapter."""
    address = (key.namespace, key.name)
    obj = await context.kube.get(LORA_ADAPTERS, *address)
    if obj is None:
        context.slots.leave(key)
        return None
    if "deletionTimestamp" in obj["metadata"]:
        return await _finish(context, obj)
    try:
        adapter = parse(LoRAAdapter, obj)
    except InvalidSpec as error:
        types = (Condition.ACCEPTED, Condition.READY)
        facts = [false(type_, Reason.INVALID_SPEC, str(error)) for type_ in types]
        await context.statuses.write(obj, facts, {**_memory(obj), "phase": "Failed"})
        return None
    context.store.put("LoRAAdapter", obj)
    if address[0] not in context.store.namespace_labels:
        await context.refresh_namespace(address[0])
    return await _serve(context, key, obj, adapter)


async def _serve(context: Context, key: Key, obj: Manifest, adapter: LoRAAdapter) -> float | None:
    model_address = candidate_model(adapter)
    host = context.store.hosts().get(model_address)
    status = obj.get("status") or {}
    refusal = context.store.refusals().get(address_of(obj))
    if refusal is None and host is not None:
        refusal = refusal_of(context, address_of(obj), host.model, status)
    weights = plan_adapter_weights(adapter, status)
    credentials = await _credentials(context, adapter)
    step: FetchStep | None = None
    waiting: Fact | None = None
    if refusal is None and host is not None and not adapter.spec.suspend:
        await context.finalizers.add(LORA_ADAPTERS, obj)
        if weights.to_fetch and credentials.ready:
            waiting, step = await _fetch(context, key, obj, adapter, host.model, credentials)
            weights = plan_adapter_weights(adapter, obj.get("status") or {})
    if not weights.to_fetch and context.fetch_jobs.get(key):
        # An operator was killed between writing the result down and deleting the Job.
        await context.fetches.clean(obj, model_address[0], "adapter", model_address[1])
    if step is None and not _model_was_polled(context, model_address):
        return UNKNOWN_SECONDS
    loads = _loads(context, model_address, adapter, weights)
    seen = AdapterObservation(
        suspended=adapter.spec.suspend,
        refusal=refusal,
        credentials=credentials.fact,
        weights=weights,
        step=step,
        waiting=waiting,
        pushed=adapter.name in (context.pushed.get(model_address) or ()),
        loads=loads,
        model_problem=_model_problem(context, model_address),
    )
    facts = adapter_facts(seen)
    fields = adapter_fields(seen, obj.get("status") or {})
    await context.statuses.write(obj, facts, {**fields, "phase": adapter_phase(facts, seen)})
    waits = [step.again if step is not None else None]
    if not credentials.ready or waiting is not None:
        waits.append(context.settings.secret_poll_seconds)
    elif adapter.spec.credentials_secret_ref is not None:
        rejected = step is not None and step.reason == Reason.CREDENTIALS_REJECTED
        waits.append(context.settings.secret_poll_seconds * (1 if rejected else 20))
    return min((wait for wait in waits if wait is not None), default=None)


def _model_was_polled(context: Context, model: Address) -> bool:
    """Whether the model's replicas were asked since the operator started: before that, a status
    would only say that nothing is known."""
    host = context.store.hosts().get(model)
    if host is None or host.model.spec.source.provider is not None:
        return True
    obj = context.store.get("ImageModel", model)
    if obj is None or "deletionTimestamp" in obj["metadata"]:
        return True
    return model in context.pushed and (host.model.spec.suspend or model in context.reports)


def _loads(
    context: Context, model: Address, adapter: LoRAAdapter, weights: AdapterWeights
) -> LoadSummary | None:
    report = context.reports.get(model)
    if report is None or not report.reachable:
        return None
    return summarise(adapter.name, weights.ready, report.states)


def _model_problem(context: Context, model: Address) -> str:
    found = context.store.get("ImageModel", model)
    condition = condition_of(found, Condition.SERVING) if found is not None else None
    if condition is None or condition["status"] == "True":
        return ""
    return f"The model does not serve: {condition['message']}"


async def _credentials(context: Context, adapter: LoRAAdapter) -> Credentials:
    ref = adapter.spec.credentials_secret_ref
    return await context.credentials.check(
        adapter.metadata.namespace,
        ref.name if ref is not None else None,
        CREDENTIAL_KEYS.get(source_type(adapter.spec.source), ()),
    )


async def _fetch(
    context: Context,
    key: Key,
    obj: Manifest,
    adapter: LoRAAdapter,
    model: ImageModel,
    credentials: Credentials,
) -> tuple[Fact | None, FetchStep | None]:
    """One step of the fetch, or why it must wait; what it found is in ``obj``'s status after."""
    model_obj = context.store.get("ImageModel", (model.metadata.namespace, model.name))
    base = plan_weights(model, (model_obj or {}).get("status") or {})
    volumes = volumes_of(model, context.settings)
    waiting = await _not_yet(context, adapter, base.ready is None and not base.current, volumes)
    if waiting is not None or model_obj is None:
        return waiting, None
    claim = adapter.spec.source.persistent_volume_claim
    seen = replace(volumes, adapter_source=claim.claim_name if claim is not None else None)
    manifest = model_manifest(model, base.ready)

    def task(attempt: int) -> FetchTask:
        return adapter_task(
            obj,
            adapter,
            model,
            model_obj,
            manifest,
            credentials.version,
            attempt,
            context.settings,
        )

    status = obj.get("status") or {}
    try:
        step = await context.fetches.step(key, task, last_failure(status), seen, credentials.secret)
    except NotOurs as error:
        return false(Condition.FETCHED, Reason.OBJECT_NOT_OURS, str(error)), None
    if step.fetched is not None:
        await _remember(context, obj, adapter, step)
        await context.fetches.clean(obj, model.metadata.namespace, "adapter", model.name)
        context.adapters_changed((model.metadata.namespace, model.name))
    return None, step


async def _not_yet(
    context: Context, adapter: LoRAAdapter, no_base: bool, volumes: Volumes
) -> Fact | None:
    if not volumes.keeps_weights:
        return false(
            Condition.FETCHED,
            Reason.VOLUME_MISSING,
            "The model has no volume for what is fetched: give the ImageModel "
            "spec.cache.persistentVolumeClaim a size, or use the source builtIn.",
        )
    if no_base:
        return false(
            Condition.FETCHED,
            Reason.WAITING,
            "The file is checked against the model's weights, which are not there yet.",
        )
    claim = adapter.spec.source.persistent_volume_claim
    if claim is None:
        return None
    found = await context.kube.get(CLAIMS, adapter.metadata.namespace, claim.claim_name)
    return volume_problem(
        {claim.claim_name: found}, context.kube.now(), context.settings, Condition.FETCHED
    )


async def _remember(context: Context, obj: Manifest, adapter: LoRAAdapter, step: FetchStep) -> None:
    """Writes down what a Job found before anything is done with it: the Job goes next."""
    found = step.fetched
    if found is None:
        return
    fields = {
        **_memory(obj),
        "resolvedRevision": found.revision,
        "sha256": found.sha256,
        "sizeBytes": found.size_bytes,
        "rank": found.rank,
        "targetModules": list(found.target_modules)[:64] or None,
        "path": found.path,
        "sourceHash": plan_adapter_weights(adapter, {}).source_hash,
        "phase": "Loading",
    }
    text = f"Revision {found.revision} was fetched and checked."
    facts = [
        true(Condition.RESOLVED, Reason.RESOLVED, text),
        true(Condition.FETCHED, Reason.FETCHED, text),
        true(Condition.CHECKED, Reason.CHECK_PASSED, text),
    ]
    kept = recorded_facts(obj, *(fact.type for fact in facts))
    await context.statuses.write(obj, [*kept, *facts], fields)
    fresh = await context.kube.get(LORA_ADAPTERS, *address_of(obj))
    if fresh is not None:
        obj.update(fresh)
        context.store.put("LoRAAdapter", fresh)


def _memory(obj: Manifest) -> Manifest:
    status = obj.get("status") or {}
    return {k: v for k, v in status.items() if k not in ("conditions", "observedGeneration")}


# --- the end ------------------------------------------------------------------------------------


async def _finish(context: Context, obj: Manifest) -> float | None:
    """Has the replicas forget the adapter, then lets the object go. It never waits for ever."""
    address, metadata = address_of(obj), obj["metadata"]
    spec = obj.get("spec") or {}
    ref = spec.get("modelRef") or {}
    model = (ref.get("namespace") or metadata["namespace"], ref.get("name") or "")
    elapsed = context.finalizers.deleting_for(obj) or 0.0
    await context.refresh_namespace(address[0])
    why = context.finalizers.overdue(obj, elapsed)
    if why is None and _may_be_loaded(context, obj, model, elapsed):
        pause = context.settings.busy_poll_seconds
        if elapsed < context.settings.drain_seconds:
            pause = context.settings.drain_seconds - elapsed
            context.wake_gateway()
        elif _pushed(context, obj, model) and not context.debounce.pending(
            Key("ImageModel", *model)
        ):
            context.adapters_changed(model)
        context.queue.add(Key("Report", *model))
        facts = [
            *recorded_facts(obj, Condition.READY),
            false(Condition.READY, Reason.DELETING, "The replicas are told to forget it."),
        ]
        await context.statuses.write(obj, facts, {**_memory(obj), "phase": "Terminating"})
        return pause
    if why is not None and metadata.get("finalizers"):
        await context.events.post(obj, "Warning", Reason.DELETING, f"Let go undrained: {why}.")
    if model[1]:
        await context.fetches.clean(obj, model[0], "adapter", model[1])
    await context.finalizers.remove(LORA_ADAPTERS, obj)
    context.adapters_changed(model)
    return None


def _may_be_loaded(context: Context, obj: Manifest, model: Address, elapsed: float) -> bool:
    """Whether a replica that draws may still hold the adapter."""
    host = context.store.hosts().get(model)
    model_obj = context.store.get("ImageModel", model)
    if host is None or model_obj is None or host.model.spec.suspend:
        return False
    if "deletionTimestamp" in model_obj["metadata"]:
        return False
    if address_of(obj) in context.store.refusals():
        return False  # the adapter of that name in the replicas is another one
    accepted = condition_of(model_obj, Condition.ACCEPTED)
    if accepted is not None and accepted["status"] == "False":
        # Replicas of a refused model keep what they have until it is accepted again; the gateway,
        # which has forgotten the adapter by then, sends them no request for it.
        return elapsed < context.settings.drain_seconds
    report = context.reports.get(model)
    if report is not None and report.reachable:
        return report.knows(obj["metadata"]["name"]) or _pushed(context, obj, model)
    return is_true(model_obj, Condition.SERVING) and _pushed(context, obj, model)


def _pushed(context: Context, obj: Manifest, model: Address) -> bool:
    """Also while that is not known, right after a start."""
    names = context.pushed.get(model)
    return names is None or obj["metadata"]["name"] in names

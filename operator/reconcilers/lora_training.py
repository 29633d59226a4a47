"""LoRATraining -> RayJob -> LoRAAdapter."""

from __future__ import annotations

from pydantic import ValidationError

from calotype.operator.api.conditions import (
    Condition,
    Fact,
    Reason,
    false,
    recorded_facts,
    timestamp,
    true,
)
from calotype.operator.kube.labels import TRAINING, owned_by, training_job_name
from calotype.operator.kube.objects import Address, Manifest, Object
from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    LORA_ADAPTERS,
    LORA_TRAININGS,
    RAY_JOBS,
)
from calotype.operator.manifests.custom_resources import InvalidSpec, model_manifest, parse
from calotype.operator.manifests.trainingjob import (
    PROGRESS_PATH,
    JobState,
    build_adapter,
    build_config,
    build_rayjob,
    config_name,
    credential_keys,
    read_job,
)
from calotype.operator.planning.weights import plan_weights
from calotype.operator.reconcilers.former_names import former_training_job
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.model_app import NoAnswer
from calotype.operator.runtime.workqueue import Key
from calotype.operator.runtime.writers.children import NotOurs
from calotype.serving.config import LoRATraining
from calotype.serving.wire.training_progress import TrainingProgress

_MEMORY = (
    "step",
    "totalSteps",
    "progress",
    "loss",
    "etaSeconds",
    "samples",
    "startTime",
    "completionTime",
    "jobName",
    "adapterRef",
    "lastFailure",
)


async def reconcile_training(context: Context, key: Key) -> float | None:
    """One look at one training."""
    obj = await context.kube.get(LORA_TRAININGS, key.namespace, key.name)
    if obj is None or "deletionTimestamp" in obj["metadata"]:
        if obj is not None:
            await context.finalizers.remove(LORA_TRAININGS, obj)
        return None
    try:
        training = parse(LoRATraining, obj)
    except InvalidSpec as error:
        types = (Condition.ACCEPTED, Condition.READY)
        facts = [false(type_, Reason.INVALID_SPEC, str(error)) for type_ in types]
        await context.statuses.write(obj, facts, {**_memory(obj), "phase": "Failed"})
        return None
    if _ended(obj):
        return await _adapter(context, obj, training)
    credentials = await context.credentials.check(
        key.namespace,
        ref.name if (ref := training.spec.credentials_secret_ref) is not None else None,
        credential_keys(training),
    )
    accepted = await _accepted(context, training)
    if not accepted.holds or not credentials.ready:
        cause = accepted if not accepted.holds else credentials.fact
        facts = [
            accepted,
            credentials.fact,
            false(Condition.READY, cause.reason, cause.message),
        ]
        await context.statuses.write(obj, facts, {**_memory(obj), "phase": "Pending"})
        return context.settings.secret_poll_seconds
    try:
        job = await _job(context, obj, training)
    except NotOurs as error:
        types = (Condition.ACCEPTED, Condition.READY)
        facts = [false(type_, Reason.OBJECT_NOT_OURS, str(error)) for type_ in types]
        await context.statuses.write(obj, facts, {**_memory(obj), "phase": "Pending"})
        return context.settings.secret_poll_seconds
    state = read_job(job, training.spec.suspend)
    fields = await _fields(context, obj, training, job, state)
    facts = [accepted, credentials.fact, state.running, state.succeeded, _ready(state)]
    await context.statuses.write(obj, facts, fields)
    if state.phase == "Succeeded":
        context.queue.add(key)
        return None
    return None if state.phase == "Failed" else context.settings.status_poll_seconds


async def _accepted(context: Context, training: LoRATraining) -> Fact:
    type_ = Condition.ACCEPTED
    address = _model(training)
    host = context.store.hosts().get(address)
    name = training.spec.resource_profile
    if host is None or host.model.spec.source.provider is not None:
        reason = Reason.MODEL_MISSING if host is None else Reason.MODEL_UNSUITABLE
        what = "does not exist" if host is None else "is drawn by a provider"
        return false(
            type_, reason, f"ImageModel {'/'.join(address)} {what}: correct spec.modelRef."
        )
    if context.settings.profile(name) is None:
        known = ", ".join(sorted({"default", *context.settings.resource_profiles}))
        return false(
            type_,
            Reason.PROFILE_UNKNOWN,
            f"spec.resourceProfile is {name!r}, but resourceProfiles of the chart has {known}.",
        )
    if not await context.kube.serves(RAY_JOBS):
        return false(
            type_,
            Reason.KUBERAY_NOT_INSTALLED,
            "The cluster has no RayJob kind: install KubeRay; the training begins by itself then.",
        )
    obj = context.store.get("ImageModel", address)
    plan = plan_weights(host.model, (obj or {}).get("status") or {})
    if plan.ready is None and not plan.current:
        return false(type_, Reason.WAITING, "The model's weights are not there yet.")
    return true(type_, Reason.ACCEPTED, "The manifest can be trained.")


async def _job(context: Context, obj: Object, training: LoRATraining) -> Manifest | None:
    """The RayJob, made where it is missing; of a running one only ``suspend`` is changed."""
    settings, namespace = context.settings, training.metadata.namespace
    profile = settings.profile(training.spec.resource_profile)
    host = context.store.hosts().get(_model(training))
    if profile is None or host is None:
        return None
    model_obj = context.store.get("ImageModel", _model(training))
    plan = plan_weights(host.model, (model_obj or {}).get("status") or {})
    config = build_config(obj, training, model_manifest(host.model, plan.ready), settings)
    live_config = await context.kube.get(CONFIG_MAPS, namespace, config_name(training.name))
    place = (RAY_JOBS, namespace, training_job_name(training.name))
    job = await context.kube.get(*place)
    if job is None and (former := await former_training_job(context, obj)) is not None:
        place, job = (RAY_JOBS, namespace, training.name), former
    if job is None or live_config is None:
        await context.children.apply(config, live_config)
    if job is None:
        made = await context.kube.create(build_rayjob(obj, training, profile, settings))
        if made is not None:
            return made
        job = await context.kube.get(*place)
    if job is None:
        return None
    if not owned_by(job, obj):
        raise NotOurs(RAY_JOBS.kind, namespace, training_job_name(training.name))
    if bool(job["spec"].get("suspend")) != training.spec.suspend:
        body = {"spec": {"suspend": training.spec.suspend}}
        job = await context.kube.patch(*place, body) or job
    return job


async def _fields(
    context: Context,
    obj: Object,
    training: LoRATraining,
    job: Object | None,
    state: JobState,
) -> Manifest:
    now = timestamp(context.kube.now())
    fields = {**_memory(obj), "phase": state.phase, "totalSteps": training.spec.steps}
    if job is not None:
        fields["jobName"] = job["metadata"]["name"]
        status = job.get("status") or {}
        if status.get("startTime"):
            fields.setdefault("startTime", status["startTime"])
        if state.phase in ("Succeeded", "Failed"):
            fields.setdefault("completionTime", status.get("endTime") or now)
    if state.phase == "Running" and job is not None:
        fields |= await _progress(context, training, job)
    if state.failure is not None:
        fields["lastFailure"] = {
            "time": fields.get("completionTime") or now,
            "reason": str(Reason.JOB_FAILED),
            "message": state.failure,
            "attempts": 1,
        }
    return fields


async def _progress(context: Context, training: LoRATraining, job: Object) -> Manifest:
    """Status fields of what the trainer answers; none where it does not answer."""
    cluster = (job.get("status") or {}).get("rayClusterName")
    if not cluster:
        return {}
    # A trainer tells how far it is, and no secrets: it has no certificate.
    url = context.apps.url(f"{cluster}-head-svc", training.metadata.namespace, "http")
    try:
        answer = await context.apps.get(f"{url}{PROGRESS_PATH}")
        progress = TrainingProgress.model_validate_json(answer)
    except (NoAnswer, ValidationError):
        return {}
    names = ("step", "loss", "etaSeconds", "samples")
    fields = {name: value for name, value in progress.payload().items() if name in names}
    if progress.step is not None:
        fields["progress"] = f"{progress.step}/{training.spec.steps}"
    return fields


async def _adapter(context: Context, obj: Manifest, training: LoRATraining) -> float | None:
    """What follows a training that has ended: its adapter, made once."""
    status = obj.get("status") or {}
    if status.get("phase") == "Failed" or status.get("adapterRef"):
        return None
    wanted = build_adapter(training, context.settings)
    namespace, name = wanted["metadata"]["namespace"], wanted["metadata"]["name"]
    await context.kube.create(wanted)
    live = await context.kube.get(LORA_ADAPTERS, namespace, name)
    facts = recorded_facts(obj, Condition.READY)
    if live is None or (live["metadata"].get("labels") or {}).get(TRAINING) != training.name:
        text = (
            f"There is a LoRAAdapter {name} already that is not of this training: delete it, or "
            "give spec.adapterTemplate.metadata.name another name."
        )
        facts.append(false(Condition.READY, Reason.NAME_CONFLICT, text))
        await context.statuses.write(obj, facts, {**_memory(obj), "phase": "Succeeded"})
        return context.settings.secret_poll_seconds
    facts.append(true(Condition.READY, Reason.READY, f"LoRAAdapter {name} was made."))
    fields = {
        **_memory(obj),
        "phase": "Succeeded",
        "adapterRef": {"name": name, "namespace": namespace},
    }
    await context.statuses.write(obj, facts, fields)
    return None


def _ready(state: JobState) -> Fact:
    if state.succeeded.holds:
        return false(Condition.READY, Reason.WAITING, "The LoRAAdapter is being made.")
    cause = state.succeeded if state.failure is not None else state.running
    return Fact(Condition.READY, "False", cause.reason, cause.message)


def _ended(obj: Object) -> bool:
    """Whether the RayJob need not be looked at any more: it may be gone by now."""
    return (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _memory(obj: Object) -> Manifest:
    status = obj.get("status") or {}
    return {name: status[name] for name in _MEMORY if name in status}


def _model(training: LoRATraining) -> Address:
    ref = training.spec.model_ref
    return (ref.namespace or training.metadata.namespace, ref.name)

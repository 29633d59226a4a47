"""What an ImageModel's status says: pure, of everything that was observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from calotype.operator.api.conditions import Condition, Fact, Reason, false, true, unknown
from calotype.operator.kube.objects import Object
from calotype.operator.manifests.custom_resources import Weights
from calotype.operator.manifests.pods import Volumes
from calotype.operator.planning.fetch_step import FetchStep
from calotype.operator.planning.model_report import ModelReport
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.weights import WeightsPlan
from calotype.serving.config import ImageModel


@dataclass(frozen=True, slots=True)
class ModelObservation:
    """What a reconcile found out about a model."""

    model: ImageModel
    refusal: Refusal | None
    credentials: Fact
    weights: WeightsPlan
    volumes: Volumes
    volume_problem: Fact | None = None
    fetch: FetchStep | None = None
    kuberay: bool = True
    """Whether RayService is installed; without meaning for a SinglePod."""
    workload: Object | None = None
    """The Deployment or the RayService."""
    report: ModelReport | None = None
    config_hash: str = ""
    """Of what the replicas were given last."""
    upgrade: Fact | None = None
    pushed: Sequence[str] = field(default_factory=tuple)
    rivals: str | None = None
    """Which other models ask for one of its names."""


def facts_of(seen: ModelObservation) -> list[Fact]:
    """All conditions of the model."""
    accepted = _accepted(seen)
    if seen.model.spec.source.provider is not None:
        return [accepted, seen.credentials, *_provider(accepted, seen.credentials)]
    weights = weights_fact(seen)
    serving = _serving(seen, weights)
    found = [accepted, seen.credentials, weights, serving]
    if seen.rivals is not None:
        text = f"{seen.rivals}. It stays with this one unless an administrator says otherwise."
        found.append(true(Condition.NAMES_CONTESTED, Reason.NAME_CONFLICT, text))
    if seen.model.spec.runtime == "RayService":
        found.append(_kuberay(seen))
        if seen.upgrade is not None:
            found.append(seen.upgrade)
    return [*found, _ready(seen, [accepted, seen.credentials, weights, serving])]


def phase_of(model: ImageModel, facts: Sequence[Fact]) -> str:
    """One word for `kubectl get`."""
    by_type = {fact.type: fact for fact in facts}
    if model.spec.suspend:
        return "Suspended"
    if by_type[Condition.READY].holds:
        return "Ready"
    serving = by_type.get(Condition.SERVING)
    if serving is not None and serving.holds:
        return "Degraded"
    if not by_type[Condition.ACCEPTED].holds:
        return "Failed"
    if model.spec.source.provider is not None:
        return "Pending"
    weights = by_type.get(Condition.WEIGHTS_CACHED)
    if weights is not None and not weights.holds:
        return "Fetching" if weights.reason in (Reason.FETCHING, Reason.QUEUED) else "Pending"
    if serving is None or by_type[Condition.CREDENTIALS_READY].status == "False":
        return "Pending"
    return "Failed" if serving.reason == Reason.APPLICATION_FAILED else "Starting"


def _accepted(seen: ModelObservation) -> Fact:
    if seen.refusal is not None:
        return false(Condition.ACCEPTED, seen.refusal.reason, seen.refusal.message)
    return true(Condition.ACCEPTED, Reason.ACCEPTED, "The manifest can be served.")


def _provider(accepted: Fact, credentials: Fact) -> list[Fact]:
    cause = next((fact for fact in (accepted, credentials) if not fact.holds), None)
    reason: Reason | str = Reason.PROVIDER_NOT_SERVED
    text = (
        "This version's gateway sends no request to a provider: use a source whose weights run "
        "here."
    )
    if cause is not None:
        reason, text = cause.reason, cause.message
    return [false(Condition.SERVING, reason, text), false(Condition.READY, reason, text)]


def weights_fact(seen: ModelObservation) -> Fact:
    """Whether the weights that the manifest asks for are where the pods find them."""
    type_ = Condition.WEIGHTS_CACHED
    plan, step = seen.weights, seen.fetch
    if seen.volume_problem is not None:
        return seen.volume_problem
    if plan.current:
        if plan.ready is None or not plan.ready.revision:
            return true(type_, Reason.NOT_NEEDED, "The source needs no fetching.")
        return true(type_, Reason.FETCHED, _have(plan.ready))
    old = f" Until then {_have(plan.ready)}" if plan.ready is not None else ""
    if step is None:
        cause = seen.refusal.reason if seen.refusal is not None else seen.credentials.reason
        return false(type_, cause, f"Nothing is fetched before that is put right.{old}")
    return false(type_, step.reason, f"{step.message}{old}")


def _have(weights: Weights) -> str:
    return f"Revision {weights.revision} is on the volume."


def _kuberay(seen: ModelObservation) -> Fact:
    type_ = Condition.KUBERAY_MISSING
    if seen.kuberay:
        return false(type_, Reason.KUBERAY_INSTALLED, "RayService is installed.")
    return true(
        type_,
        Reason.KUBERAY_NOT_INSTALLED,
        "The cluster has no RayService kind: install KubeRay (helm install kuberay-operator "
        "kuberay/kuberay-operator), or set spec.runtime: SinglePod in a new ImageModel.",
    )


def _serving(seen: ModelObservation, weights: Fact) -> Fact:
    type_ = Condition.SERVING
    if seen.model.spec.suspend:
        return false(type_, Reason.SUSPENDED, "spec.suspend is true; requests are kept and wait.")
    if seen.model.spec.runtime == "RayService" and not seen.kuberay:
        return false(type_, Reason.KUBERAY_NOT_INSTALLED, "KubeRay is not installed.")
    if seen.workload is None:
        cause = next((f for f in (weights, seen.credentials) if not f.holds), None)
        if seen.refusal is not None:
            return false(type_, seen.refusal.reason, "Nothing is started before that is put right.")
        if cause is not None:
            return false(type_, Reason.WAITING, f"It is started when {cause.type} holds.")
        return false(type_, Reason.STARTING, "The pods are being made.")
    failed = application_failure(seen.workload)
    report = seen.report
    if report is None or not report.reachable:
        if failed is not None:
            return false(type_, Reason.APPLICATION_FAILED, failed)
        said = report.message if report is not None else "Nobody has asked it yet."
        reason = Reason.UNREACHABLE if _was_up(seen.workload) else Reason.STARTING
        return false(type_, reason, f"The model app does not answer: {said}")
    if report.ready and report.ready_replicas > 0:
        return true(type_, Reason.SERVING, f"{report.ready_replicas} replicas draw.")
    return false(
        type_, Reason.NOT_READY, f"No replica draws yet. {failed or report.message}".strip()
    )


def application_failure(workload: Object) -> str | None:
    """What Serve says of an application that failed; None = nothing bad."""
    status = workload.get("status") or {}
    for service in ("activeServiceStatus", "pendingServiceStatus"):
        applications = (status.get(service) or {}).get("applicationStatuses") or {}
        for name, application in applications.items():
            if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                said = str(application.get("message") or "no message").strip()
                return f"Application {name} is {application['status']}: {said[-600:]}"
    return None


def _was_up(workload: Object) -> bool:
    """Whether Kubernetes thinks that the workload answers."""
    status = workload.get("status") or {}
    if workload.get("kind") == "Deployment":
        return bool(status.get("readyReplicas"))
    return any(
        c.get("type") == "Ready" and c.get("status") == "True"
        for c in status.get("conditions") or ()
    )


def _ready(seen: ModelObservation, causes: Sequence[Fact]) -> Fact:
    type_ = Condition.READY
    for fact in causes:
        if not fact.holds and fact.type != Condition.WEIGHTS_CACHED:
            return Fact(type_, fact.status, fact.reason, fact.message)
    weights = next((f for f in causes if f.type == Condition.WEIGHTS_CACHED), None)
    if weights is not None and not weights.holds:
        if seen.weights.ready is not None:
            return false(type_, Reason.OLD_REVISION_SERVING, weights.message)
        return false(type_, weights.reason, weights.message)
    report = seen.report
    if report is None:
        return unknown(type_, Reason.STARTING, "Nobody has asked the model app yet.")
    if report.config_hash and seen.config_hash and report.config_hash != seen.config_hash:
        return false(
            type_, Reason.CONFIG_PENDING, "The replicas still have the configuration before."
        )
    if seen.upgrade is not None and seen.upgrade.reason == Reason.HELD_BACK:
        return false(type_, seen.upgrade.reason, seen.upgrade.message)
    return true(type_, Reason.READY, f"{report.ready_replicas} replicas draw.")

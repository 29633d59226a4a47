"""What a LoRAAdapter's status says: pure, of everything that was observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calotype.operator.api.conditions import Condition, Fact, Reason, false, true, unknown
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.planning.adapters import (
    LoadSummary,
)
from calotype.operator.planning.fetch_step import FetchStep, failure_field
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.weights import AdapterWeights
from calotype.serving.wire.fetch_faults import fault_of


@dataclass(frozen=True, slots=True)
class AdapterObservation:
    """What a reconcile found out about an adapter."""

    suspended: bool
    refusal: Refusal | None
    credentials: Fact
    weights: AdapterWeights
    step: FetchStep | None
    waiting: Fact | None
    """Why nothing is fetched yet, for the model's sake."""
    pushed: bool
    """Whether the model's configuration has it."""
    loads: LoadSummary | None
    """What the replicas say; None = nobody knows."""
    model_problem: str = ""
    """Why no replica can say anything."""


def adapter_facts(seen: AdapterObservation) -> list[Fact]:
    """All conditions of the adapter."""
    found = [_accepted(seen), seen.credentials, *_file(seen), _loaded(seen)]
    return [*found, _ready(seen, found)]


def adapter_phase(facts: Sequence[Fact], seen: AdapterObservation) -> str:
    by_type = {fact.type: fact for fact in facts}
    if seen.suspended:
        return "Suspended"
    if by_type[Condition.READY].holds:
        return "Ready"
    accepted = by_type[Condition.ACCEPTED]
    if not accepted.holds:
        waits = (Reason.MODEL_MISSING, Reason.CAPACITY_EXCEEDED)
        return "Pending" if accepted.reason in waits else "Failed"
    if seen.loads is not None and seen.loads.loaded + seen.loads.old_serving:
        return "Degraded" if _trouble(seen) else "Loading"
    if seen.step is not None and seen.step.failed:
        return "Failed"
    for type_, phase in (
        (Condition.CREDENTIALS_READY, "Pending"),
        (Condition.RESOLVED, "Resolving"),
        (Condition.FETCHED, "Fetching"),
        (Condition.CHECKED, "Checking"),
    ):
        if not by_type[type_].holds:
            return phase
    if seen.loads is not None and seen.loads.failed:
        return "Failed"
    return "Loading"


def adapter_fields(seen: AdapterObservation, status: Object) -> Manifest:
    """The rest of the status: what is our memory, and what the replicas say."""
    kept = (
        "resolvedRevision",
        "sha256",
        "sizeBytes",
        "rank",
        "targetModules",
        "path",
        "sourceHash",
        "acceptedRevisions",
        "lastFailure",
    )
    found = {name: status[name] for name in kept if name in status}
    if seen.weights.accepted:
        found["acceptedRevisions"] = list(seen.weights.accepted)
    if seen.step is not None and seen.step.failure is not None:
        found["lastFailure"] = failure_field(seen.step.failure)
    loads = seen.loads
    if loads is not None and not seen.suspended:
        found["loaded"] = loads.text
        found["replicas"] = {
            "desired": loads.desired,
            "loaded": loads.loaded,
            "failed": loads.failed,
        }
        states = [s.model_dump(by_alias=True, exclude_none=True) for s in loads.states]
        found["loadStates"] = states or None
    return found


def _accepted(seen: AdapterObservation) -> Fact:
    if seen.refusal is not None:
        return false(Condition.ACCEPTED, seen.refusal.reason, seen.refusal.message)
    return true(Condition.ACCEPTED, Reason.ACCEPTED, "The manifest can be served.")


def _file(seen: AdapterObservation) -> list[Fact]:
    """Resolved, Fetched and Checked: one Job does all three."""
    types = (Condition.RESOLVED, Condition.FETCHED, Condition.CHECKED)
    plan, step = seen.weights, seen.step
    if plan.current:
        newest = plan.checked or plan.ready
        if newest is None:
            return [true(t, Reason.NOT_NEEDED, "It lies where the pods are.") for t in types]
        text = f"Revision {newest.revision} was fetched and checked."
        reasons = (Reason.RESOLVED, Reason.FETCHED, Reason.CHECK_PASSED)
        return [true(t, reason, text) for t, reason in zip(types, reasons, strict=True)]
    if seen.waiting is not None:
        return [Fact(t, "False", seen.waiting.reason, seen.waiting.message) for t in types]
    if step is None:
        reason, text = Reason.WAITING, "Nothing is fetched before the above is put right."
        return [false(t, reason, text) for t in types]
    fault = fault_of(step.reason) if step.failed else None
    if fault is not None and fault.in_file:
        return [
            true(types[0], Reason.RESOLVED, "The source was found."),
            true(types[1], Reason.FETCHED, "The file was fetched."),
            false(types[2], step.reason, step.message),
        ]
    if step.failed:
        return [false(t, step.reason, step.message) for t in types]
    return [false(t, step.reason, step.message) for t in types]


def _loaded(seen: AdapterObservation) -> Fact:
    type_, loads = Condition.LOADED, seen.loads
    if seen.suspended:
        return false(type_, Reason.SUSPENDED, "spec.suspend is true.")
    if seen.refusal is not None:
        return false(type_, seen.refusal.reason, "It is not loaded anywhere.")
    if seen.weights.held and not seen.weights.servable:
        return false(type_, Reason.NOT_ACCEPTED, seen.weights.held)
    if not seen.weights.servable:
        return false(type_, Reason.WAITING, "It is loaded when it has been checked.")
    if loads is None or loads.desired == 0:
        text = seen.model_problem or "The model has no replica that draws."
        if not seen.pushed:
            return false(type_, Reason.NOT_PUSHED, f"No replica has been told of it yet. {text}")
        return unknown(type_, Reason.NOT_READY, text)
    if not seen.pushed:
        return false(type_, Reason.NOT_PUSHED, "It travels with the next configuration.")
    text = f"{loads.text} replicas have it"
    if loads.loaded == loads.desired:
        return true(type_, Reason.LOADED, f"{text}.")
    if loads.failed:
        reason = Reason.PARTIALLY_LOADED if loads.loaded else Reason.LOAD_FAILED
        old = f" {loads.old_serving} still draw with the revision before." * bool(loads.old_serving)
        return false(type_, reason, f"{text}, {loads.failed} could not: {loads.first_failure}{old}")
    return false(type_, Reason.LOADING, f"{text}.")


def _ready(seen: AdapterObservation, facts: Sequence[Fact]) -> Fact:
    type_ = Condition.READY
    if seen.suspended:
        return false(type_, Reason.SUSPENDED, "spec.suspend is true.")
    for fact in facts:
        if fact.holds:
            continue
        if fact.type in (Condition.RESOLVED, Condition.FETCHED, Condition.CHECKED):
            if seen.weights.ready is not None:
                return false(
                    type_,
                    Reason.OLD_REVISION_SERVING,
                    f"Revision {seen.weights.ready.revision} goes on serving. {fact.message}",
                )
        return Fact(type_, "False" if fact.status == "False" else "Unknown", *_why(fact))
    if seen.weights.held:
        return false(type_, Reason.OLD_REVISION_SERVING, seen.weights.held)
    loads = seen.loads
    return true(type_, Reason.READY, f"{loads.text if loads else ''} replicas have it.")


def _why(fact: Fact) -> tuple[Reason | str, str]:
    return fact.reason, fact.message


def _trouble(seen: AdapterObservation) -> bool:
    loads = seen.loads
    failing = seen.step is not None and seen.step.failed
    return failing or (loads is not None and loads.failed > 0)

"""Conditions: what is known about an object, as facts with typed reasons.

A condition's type is a fact (`Condition`), its reason one word for programs (`Reason`), its message
a sentence for people that says what to do. `set_condition` keeps ``lastTransitionTime`` while the
status stays the same, so that a status that says the same is the same.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from calotype.operator.kube.objects import Manifest, Object

Truth = Literal["True", "False", "Unknown"]


class Condition(enum.StrEnum):
    """Condition types, in the order in which they become true."""

    ACCEPTED = "Accepted"
    CREDENTIALS_READY = "CredentialsReady"
    WEIGHTS_CACHED = "WeightsCached"
    KEY_READY = "KeyReady"
    RESOLVED = "Resolved"
    FETCHED = "Fetched"
    CHECKED = "Checked"
    SERVING = "Serving"
    LOADED = "Loaded"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    READY = "Ready"
    UPGRADE_PLANNED = "UpgradePlanned"
    KUBERAY_MISSING = "KubeRayMissing"
    NAMES_CONTESTED = "NamesContested"


class Reason(enum.StrEnum):
    """Why a condition is what it is."""

    # the object itself
    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    NAME_CONFLICT = "NameConflict"
    NAME_RESERVED = "NameReserved"
    GRANT_EXCEEDED = "GrantExceeded"
    BOUNDED = "Bounded"
    REFERENCE_CYCLE = "ReferenceCycle"
    MODEL_MISSING = "ModelMissing"
    MODEL_REFUSED = "ModelRefused"
    MODEL_UNSUITABLE = "ModelUnsuitable"
    NAMESPACE_NOT_ALLOWED = "NamespaceNotAllowed"
    POLICY_MISSING = "PolicyMissing"
    POLICY_LAXER = "PolicyLaxer"
    PROFILE_UNKNOWN = "ProfileUnknown"
    FALLBACK_MISSING = "FallbackMissing"
    PATH_NOT_ABSOLUTE = "PathNotAbsolute"
    PATH_NOT_ALLOWED = "PathNotAllowed"
    NAME_NOT_GRANTED = "NameNotGranted"
    OBJECT_NOT_OURS = "ObjectNotOurs"
    CAPACITY_EXCEEDED = "CapacityExceeded"
    SUSPENDED = "Suspended"
    DELETING = "Deleting"
    # credentials
    NOT_NEEDED = "NotNeeded"
    CREDENTIALS_FOUND = "CredentialsFound"
    SECRET_MISSING = "SecretMissing"
    SECRET_KEY_MISSING = "SecretKeyMissing"
    SECRET_NOT_OURS = "SecretNotOurs"
    CREDENTIALS_REJECTED = "CredentialsRejected"
    # weights
    WAITING = "Waiting"
    FETCHING = "Fetching"
    QUEUED = "Queued"
    FETCHED = "Fetched"
    RESOLVED = "Resolved"
    CHECK_PASSED = "CheckPassed"
    NOT_ACCEPTED = "NotAccepted"
    FETCH_FAILED = "FetchFailed"
    FETCH_KILLED = "FetchOutOfMemory"
    FETCH_NOT_STARTED = "FetchNotStarted"
    FETCH_TIMED_OUT = "FetchTimedOut"
    VOLUME_NOT_BOUND = "VolumeNotBound"
    VOLUME_MISSING = "VolumeMissing"
    # serving
    KUBERAY_NOT_INSTALLED = "KubeRayNotInstalled"
    KUBERAY_INSTALLED = "KubeRayInstalled"
    STARTING = "Starting"
    SERVING = "Serving"
    UNREACHABLE = "Unreachable"
    NOT_READY = "NotReady"
    APPLICATION_FAILED = "ApplicationFailed"
    INITIALIZING_TIMEOUT = "InitializingTimeout"
    CONFIG_PENDING = "ConfigPending"
    PROVIDER_NOT_SERVED = "ProviderNotServed"
    READY = "Ready"
    NEW_CLUSTER = "NewCluster"
    HELD_BACK = "HeldBack"
    NO_UPGRADE = "NoUpgrade"
    # adapters
    NOT_PUSHED = "NotPushed"
    LOADING = "Loading"
    LOADED = "Loaded"
    LOAD_FAILED = "LoadFailed"
    PARTIALLY_LOADED = "PartiallyLoaded"
    OLD_REVISION_SERVING = "OldRevisionServing"
    # teams and trainings
    KEY_CREATED = "KeyCreated"
    IN_USE = "InUse"
    JOB_RUNNING = "JobRunning"
    JOB_FAILED = "JobFailed"
    JOB_SUCCEEDED = "JobSucceeded"
    # us
    RECONCILE_FAILED = "ReconcileFailed"


@dataclass(frozen=True, slots=True)
class Fact:
    """A condition as a plan states it; time and generation are added when it is written."""

    type: Condition
    status: Truth
    reason: Reason | str
    message: str

    @property
    def holds(self) -> bool:
        return self.status == "True"


def true(type_: Condition, reason: Reason | str, message: str) -> Fact:
    return Fact(type_, "True", reason, message)


def false(type_: Condition, reason: Reason | str, message: str) -> Fact:
    return Fact(type_, "False", reason, message)


def unknown(type_: Condition, reason: Reason | str, message: str) -> Fact:
    return Fact(type_, "Unknown", reason, message)


def set_condition(
    conditions: Sequence[Object], fact: Fact, *, generation: int, now: str
) -> list[Manifest]:
    """The conditions with ``fact`` among them, in the order of `Condition`."""
    kept = [dict(c) for c in conditions if c.get("type") != fact.type]
    old = next((c for c in conditions if c.get("type") == fact.type), None)
    same = old is not None and old.get("status") == fact.status and old.get("lastTransitionTime")
    kept.append(
        {
            "type": str(fact.type),
            "status": fact.status,
            "observedGeneration": generation,
            "lastTransitionTime": old["lastTransitionTime"] if same and old else now,
            "reason": str(fact.reason),
            "message": fact.message[:MESSAGE_CHARS],
        }
    )
    return sorted(kept, key=lambda c: _ORDER.get(str(c.get("type")), len(_ORDER)))


def set_conditions(
    conditions: Sequence[Object], facts: Iterable[Fact], *, generation: int, now: str
) -> list[Manifest]:
    """All facts; conditions that no fact speaks of are dropped, for they would be out of date."""
    facts = list(facts)
    stated = {fact.type for fact in facts}
    found = [dict(c) for c in conditions if c.get("type") in stated]
    for fact in facts:
        found = set_condition(found, fact, generation=generation, now=now)
    return found


def condition_of(obj: Object, type_: Condition) -> Object | None:
    """The condition of an object's status, None if it has none."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((c for c in conditions if c.get("type") == type_), None)


def recorded_facts(obj: Object, *without: Condition) -> list[Fact]:
    """What an object's status says already, but for the conditions ``without``."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return [
        Fact(Condition(c["type"]), c["status"], c["reason"], c["message"])
        for c in conditions
        if c["type"] in set(Condition) and c["type"] not in without
    ]


def is_true(obj: Object, type_: Condition) -> bool:
    found = condition_of(obj, type_)
    return found is not None and found.get("status") == "True"


MESSAGE_CHARS = 1024
"""A message with a traceback in it would make every status write large."""
_ORDER = {str(type_): rank for rank, type_ in enumerate(Condition)}


def timestamp(moment: datetime.datetime) -> str:
    """RFC 3339 with whole seconds, as Kubernetes writes times."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str | None) -> datetime.datetime | None:
    """The time that `timestamp` wrote; None for nothing and for what is no time."""
    if not text:
        return None
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)

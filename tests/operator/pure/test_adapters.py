"""Which adapters a model takes, what its replicas say of them, and what their status says then."""

from __future__ import annotations

from typing import Any

import pytest

from calotype.operator.api.conditions import Condition, Reason, false, true
from calotype.operator.kube.objects import Address
from calotype.operator.manifests.custom_resources import Weights
from calotype.operator.planning.adapter_policy import policy_problem
from calotype.operator.planning.adapter_status import (
    AdapterObservation,
    adapter_facts,
    adapter_fields,
    adapter_phase,
)
from calotype.operator.planning.adapters import (
    Candidate,
    Host,
    LoadSummary,
    admit,
    candidate_model,
    fits,
    summarise,
)
from calotype.operator.planning.fetch_step import FetchStep
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.weights import AdapterWeights, plan_adapter_weights
from calotype.serving.config import LoRAAdapter, Retried
from calotype.serving.wire.model_status import AdapterState, ReplicaState

from .parts import HUB, adapter, model, settings

SHAPES: Address = ("calotype", "shapes")
FROM_ELSEWHERE = {"modelRef": {"name": "shapes", "namespace": "calotype"}}


def candidate(
    one: LoRAAdapter, created: str = "2026-11-23T09:00:00Z", size: int = 400
) -> Candidate:
    address = (one.metadata.namespace, one.name)
    return Candidate(address, created, candidate_model(one), one, size)


def refusals(*candidates: Candidate, spec: Any = None, **changed: Any) -> dict[Address, str]:
    hosts = {SHAPES: Host(model(**(spec or {})))}
    labels = {"shoes": {"team": "shoes"}, "bags": {"team": "bags"}}
    found = admit(candidates, hosts, labels, settings(**changed))
    return {address: str(refusal.reason) for address, refusal in found.items()}


def test_an_adapter_needs_a_model_that_takes_it() -> None:
    lost = candidate(adapter("a", modelRef={"name": "nothing"}))
    assert refusals(lost) == {("calotype", "a"): "ModelMissing"}
    paid = {
        "source": {"provider": {"name": "openai", "model": "gpt-image-1"}},
        "credentialsSecretRef": {"name": "openai"},
    }
    assert refusals(candidate(adapter("a")), spec=paid) == {("calotype", "a"): "ModelUnsuitable"}
    relative = candidate(adapter("a", source={"path": "loras/a.safetensors"}))
    assert refusals(relative) == {("calotype", "a"): "PathNotAbsolute"}


@pytest.mark.parametrize(
    ("namespaces", "refused"),
    [
        ({}, {"shoes", "bags"}),
        ({"from": "All"}, set()),
        ({"from": "Selector", "selector": {"matchLabels": {"team": "shoes"}}}, {"bags"}),
    ],
)
def test_a_model_says_from_which_namespaces_it_takes_adapters(
    namespaces: dict[str, Any], refused: set[str]
) -> None:
    ones = [candidate(adapter(n, n, **FROM_ELSEWHERE)) for n in ("shoes", "bags")]
    found = refusals(*ones, spec={"adapters": {"namespaces": namespaces}})
    assert found == {(name, name): "NamespaceNotAllowed" for name in refused}


def test_the_oldest_of_one_name_is_served() -> None:
    spec = {"adapters": {"namespaces": {"from": "All"}}}
    young = candidate(adapter("a", "calotype"), "2026-11-23T09:00:09Z")
    old = candidate(adapter("a", "shoes", **FROM_ELSEWHERE), "2026-11-23T09:00:01Z")
    assert refusals(young, old, spec=spec) == {("calotype", "a"): "NameConflict"}


@pytest.mark.parametrize("bound", [{"maxAdaptersPerModel": 3}, {"maxConfigBytes": 1200}])
def test_what_does_not_fit_waits_for_room(bound: dict[str, int]) -> None:
    ones = [candidate(adapter(name)) for name in "abcd"]
    assert refusals(*ones, **bound) == {("calotype", "d"): "CapacityExceeded"}
    assert refusals(*ones[1:], **bound) == {}
    idle = candidate(adapter("a", suspend=True))
    assert refusals(idle, *ones[1:], **bound) == {}, "a suspended one takes no room"


def test_a_file_fits_the_limits_that_the_model_has_now() -> None:
    small = model(adapters={"maxRank": 8, "memoryBudget": "1M"})
    assert fits(small, 8, 1_000_000) is None
    for rank, size, reason in ((16, 1, "RankTooHigh"), (8, 2_000_000, "TooLarge")):
        refusal = fits(small, rank, size)
        assert refusal is not None and refusal.reason == reason


def policy(block: float) -> dict[str, Any]:
    return {"version": 1, "categories": {"sexual": {"text": {"block": block}}}}


@pytest.mark.parametrize(
    ("policies", "reason"),
    [
        ({"default": 0.5, "brand": 0.2}, None),
        ({"default": 0.5, "brand": 0.9}, "PolicyLaxer"),
        ({"default": 0.5}, "PolicyMissing"),
    ],
)
def test_a_policy_of_an_adapter_may_only_be_stricter(
    policies: dict[str, float], reason: str | None
) -> None:
    specs = {("calotype", name): policy(block) for name, block in policies.items()}
    found = policy_problem(adapter(moderationPolicyRef={"name": "brand"}), model(), specs)
    assert (found and str(found.reason)) == reason


# --- what replicas say --------------------------------------------------------------------------


def replica(number: int, state: str, revision: str = "new", **more: Any) -> ReplicaState:
    load = AdapterState(state=state, revision=revision, **more)
    return ReplicaState(replica=f"r{number}", ready=True, adapters={"stripes": load})


NEW = Weights("/adapters/new", "new")


def test_replicas_are_counted_failures_first() -> None:
    replicas = [replica(n, "ready") for n in range(3)]
    replicas += [replica(n, "failed", message="no room") for n in (3, 4)]
    replicas.append(ReplicaState(replica="r5", ready=False))
    found = summarise("stripes", NEW, replicas)
    assert (found.text, found.failed, found.first_failure) == ("3/5", 2, "no room")
    assert [state.state for state in found.states] == ["failed"] * 2 + ["ready"] * 3


def test_a_replica_with_the_revision_before_is_not_loaded() -> None:
    old = replica(0, "ready", "old")
    failing = replica(1, "failed", "new", serving_revision="old", message="NaN")
    found = summarise("stripes", NEW, [old, failing, ReplicaState(replica="r2", ready=True)])
    assert (found.loaded, found.old_serving) == (0, 2)
    assert [state.state for state in found.states] == ["failed", "missing", "loading"]


def test_what_a_later_model_app_says_counts_as_nothing() -> None:
    (state,) = summarise("stripes", NEW, [replica(0, "paused")]).states
    assert state.state == "missing"


# --- status -------------------------------------------------------------------------------------

CREDENTIALS = true(Condition.CREDENTIALS_READY, Reason.NOT_NEEDED, "")
CURRENT = AdapterWeights("h", NEW, servable=True, current=True, to_fetch=False)
CHANGED = AdapterWeights("h", NEW, servable=True, current=False, to_fetch=True)
NOTHING = AdapterWeights("h", None, servable=False, current=False, to_fetch=True)


def seen(weights: AdapterWeights, **changed: Any) -> AdapterObservation:
    given: dict[str, Any] = {
        "suspended": False,
        "refusal": None,
        "credentials": CREDENTIALS,
        "weights": weights,
        "step": None,
        "waiting": None,
        "pushed": True,
        "loads": None,
    }
    return AdapterObservation(**(given | changed))


def loads(loaded: int, failed: int, desired: int, old: int = 0) -> LoadSummary:
    return LoadSummary(desired, loaded, failed, (), old)


def failed(reason: str) -> FetchStep:
    failure = Retried(reason=reason, message="Why.", attempts=1)
    return FetchStep(failure=failure, reason=reason, message="Why.", failed=True)


SECRET = false(Condition.CREDENTIALS_READY, Reason.SECRET_MISSING, "no Secret")
RUNNING = FetchStep(reason=Reason.FETCHING, message="Job a is running.")


@pytest.mark.parametrize(
    ("observed", "phase", "type_", "reason"),
    [
        (seen(CURRENT, loads=loads(2, 0, 2)), "Ready", "Ready", "Ready"),
        (seen(CURRENT, loads=loads(3, 2, 5)), "Degraded", "Ready", "PartiallyLoaded"),
        (seen(CURRENT, loads=loads(0, 2, 2)), "Failed", "Loaded", "LoadFailed"),
        (seen(CURRENT, loads=loads(0, 2, 2, old=2)), "Degraded", "Loaded", "LoadFailed"),
        (seen(CURRENT, loads=loads(1, 0, 2)), "Loading", "Loaded", "Loading"),
        (seen(CURRENT, pushed=False, loads=loads(0, 0, 1)), "Loading", "Loaded", "NotPushed"),
        (seen(CURRENT), "Loading", "Loaded", "NotReady"),
        (seen(CURRENT, suspended=True), "Suspended", "Ready", "Suspended"),
        (seen(NOTHING, credentials=SECRET), "Pending", "Ready", "SecretMissing"),
        (seen(NOTHING, step=RUNNING), "Resolving", "Fetched", "Fetching"),
        (seen(NOTHING, step=failed("NotFound")), "Failed", "Resolved", "NotFound"),
        (seen(NOTHING, step=failed("BadWeights")), "Failed", "Checked", "BadWeights"),
        (
            seen(CHANGED, step=failed("WrongBaseModel"), loads=loads(1, 0, 1)),
            "Degraded", "Ready", "OldRevisionServing",
        ),
        (
            seen(NOTHING, refusal=Refusal(Reason.MODEL_MISSING, "no model")),
            "Pending", "Accepted", "ModelMissing",
        ),
        (
            seen(NOTHING, refusal=Refusal(Reason.NAME_CONFLICT, "taken")),
            "Failed", "Ready", "NameConflict",
        ),
    ],
)  # fmt: skip
def test_the_status_of_an_adapter(
    observed: AdapterObservation, phase: str, type_: str, reason: str
) -> None:
    facts = adapter_facts(observed)
    assert adapter_phase(facts, observed) == phase
    assert {str(fact.type): str(fact.reason) for fact in facts}[type_] == reason


def test_a_fault_in_the_file_means_that_it_was_found_and_fetched() -> None:
    facts = adapter_facts(seen(NOTHING, step=failed("BadWeights")))
    found = {str(fact.type): fact.status for fact in facts}
    assert (found["Resolved"], found["Fetched"], found["Checked"]) == ("True", "True", "False")


def test_the_rest_of_a_status_remembers_what_was_fetched() -> None:
    before = {"path": "/p", "sha256": "s", "phase": "Ready", "lastFailure": {"reason": "Old"}}
    fields = adapter_fields(seen(CHANGED, step=failed("NotFound"), loads=loads(1, 0, 2)), before)
    assert (fields["path"], fields["sha256"], fields["loaded"]) == ("/p", "s", "1/2")
    assert fields["lastFailure"]["reason"] == "NotFound"
    assert "phase" not in fields


def test_a_changed_source_is_fetched_beside_the_old_one() -> None:
    striped = adapter(source=HUB)
    first = plan_adapter_weights(striped, {})
    assert (first.servable, first.to_fetch) == (False, True)
    status = {"sourceHash": first.source_hash, "path": "/p", "sha256": "s"}
    assert plan_adapter_weights(striped, status).current
    changed = plan_adapter_weights(adapter(source=HUB, sha256="b" * 64), status)
    assert (changed.servable, changed.current, changed.to_fetch) == (True, False, True)
    assert changed.ready == Weights("/p", "", "s")

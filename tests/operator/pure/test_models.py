"""Which models are accepted, what their status says, and what the gateway is told of them."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from calotype.operator.api.conditions import Condition, Fact, Reason, false, true
from calotype.operator.kube.objects import Address, Manifest
from calotype.operator.manifests.custom_resources import (
    Weights,
    adapter_manifest,
    model_manifest,
)
from calotype.operator.manifests.gateway_config import (
    ModelEntry,
    TeamEntry,
    build_config_map,
    build_gateway_config,
    build_gateway_teams,
)
from calotype.operator.manifests.pods import Volumes
from calotype.operator.planning.claims import volume_problem
from calotype.operator.planning.fetch_step import FetchStep
from calotype.operator.planning.model_check import check_models
from calotype.operator.planning.model_report import (
    ModelReport,
    queue_field,
    read_report,
    unreachable,
)
from calotype.operator.planning.model_status import ModelObservation, facts_of, phase_of
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.team_check import Declared, policies_beside, team_refusal
from calotype.operator.planning.weights import WeightsPlan, build_claim, plan_weights
from calotype.serving.config import ImageModel
from calotype.serving.wire.gateway_config import GatewayConfig
from calotype.serving.wire.gateway_teams import GatewayTeams
from calotype.serving.wire.model_status import AdapterState, ModelAppStatus, ReplicaState

from .parts import HUB, adapter, model, owner, settings, team

NOW = datetime.datetime(2026, 11, 23, 9, 5, tzinfo=datetime.UTC)


def policy(block: float) -> Manifest:
    return {"version": 1, "categories": {"sexual": {"text": {"block": block}}}}


def refusals(*models: ImageModel, **policies: float) -> dict[str, str]:
    addressed = {(m.metadata.namespace, m.name): m for m in models}
    created = {address: f"2026-11-23T09:00:0{n}Z" for n, address in enumerate(addressed)}
    specs: dict[Address, Manifest] = {("calotype", n): policy(b) for n, b in policies.items()}
    found = check_models(addressed, created, specs, settings())
    return {address[1]: str(refusal.reason) for address, refusal in found.items()}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"resourceProfile": "a100-8gb"}, "ProfileUnknown"),
        ({"textEncoder": {"resourceProfile": "none"}}, "ProfileUnknown"),
        ({"moderationPolicyRef": {"name": "nobody"}}, "PolicyMissing"),
        ({"source": {"path": "models/flux"}}, "PathNotAbsolute"),
        ({"aliases": ["taken"]}, "NameConflict"),
        ({"runtime": "RayService", "upgradeStrategy": "Incremental"}, "InvalidSpec"),
        ({"resourceProfile": "gpu", "acceleration": {"devicesPerPicture": 9}}, "InvalidSpec"),
        ({"fallback": {"modelRef": {"name": "nothing"}}}, "FallbackMissing"),
    ],
)
def test_a_model_that_cannot_be_served_says_why(spec: Manifest, reason: str) -> None:
    assert refusals(model("first", aliases=["taken"]), model("wrong", **spec)) == {"wrong": reason}


def test_a_circle_of_fallbacks_is_reported_by_all_of_it() -> None:
    def falls_back(name: str, to: str) -> ImageModel:
        return model(name, fallback={"modelRef": {"name": to}})

    circle = [falls_back("a", "b"), falls_back("b", "c"), falls_back("c", "a")]
    beside = falls_back("d", "a")
    assert refusals(*circle, beside) == dict.fromkeys("abc", "ReferenceCycle")
    assert refusals(*circle[:2], model("c"), beside) == {}


# --- status -------------------------------------------------------------------------------------

FOUND = true(Condition.CREDENTIALS_READY, Reason.NOT_NEEDED, "")
CURRENT = WeightsPlan("h", Weights("/models", "r1"), current=True, to_fetch=False)
CHANGED = WeightsPlan("h", Weights("/models", "r1"), current=False, to_fetch=True)
NOTHING = WeightsPlan("h", None, current=False, to_fetch=True)
RUNNING: Manifest = {"kind": "Deployment", "status": {"readyReplicas": 1}}
FETCHING = FetchStep(reason=Reason.FETCHING, message="Job a is running.")
BROKEN = FetchStep(reason="ModelIncomplete", message="No model_index.json.", failed=True)


def report(ready: int = 1, config_hash: str = "c1", queue: float = 0.0) -> ModelReport:
    states = tuple(ReplicaState(replica=f"r{n}", ready=True) for n in range(ready))
    return ModelReport(
        ModelAppStatus(
            ready=ready > 0,
            replicas=ready,
            queue_seconds=queue,
            config_hash=config_hash,
            replica_states=states,
        )
    )


def seen(weights: WeightsPlan = CURRENT, spec: Any = None, **changed: Any) -> ModelObservation:
    given: dict[str, Any] = {
        "model": model(runtime="SinglePod", **(spec or {})),
        "refusal": None,
        "credentials": FOUND,
        "weights": weights,
        "volumes": Volumes(data="data"),
        "config_hash": "c1",
    }
    return ModelObservation(**(given | changed))


HELD = true(Condition.UPGRADE_PLANNED, Reason.HELD_BACK, "It needs new pods.")
FAILED_APP: Manifest = {
    "kind": "RayService",
    "status": {
        "activeServiceStatus": {
            "applicationStatuses": {"shapes": {"status": "DEPLOY_FAILED", "message": "no GPU"}}
        }
    },
}


@pytest.mark.parametrize(
    ("observed", "phase", "type_", "reason"),
    [
        (seen(workload=RUNNING, report=report()), "Ready", "Ready", "Ready"),
        (
            seen(workload=RUNNING, report=report(config_hash="c0")),
            "Degraded",
            "Ready",
            "ConfigPending",
        ),
        (seen(workload=RUNNING, report=report(ready=0)), "Starting", "Serving", "NotReady"),
        (
            seen(workload=RUNNING, report=unreachable("no route")),
            "Starting",
            "Serving",
            "Unreachable",
        ),
        (seen(workload={"kind": "Deployment"}), "Starting", "Serving", "Starting"),
        (seen(workload=FAILED_APP), "Failed", "Serving", "ApplicationFailed"),
        (seen(NOTHING, fetch=FETCHING), "Fetching", "WeightsCached", "Fetching"),
        (seen(NOTHING, fetch=BROKEN), "Pending", "WeightsCached", "ModelIncomplete"),
        (
            seen(CHANGED, fetch=BROKEN, workload=RUNNING, report=report()),
            "Degraded",
            "Ready",
            "OldRevisionServing",
        ),
        (seen(spec={"suspend": True}), "Suspended", "Serving", "Suspended"),
        (
            seen(refusal=Refusal(Reason.PROFILE_UNKNOWN, "no such profile")),
            "Failed",
            "Ready",
            "ProfileUnknown",
        ),
        (
            seen(credentials=false(Condition.CREDENTIALS_READY, Reason.SECRET_MISSING, "none")),
            "Pending",
            "Ready",
            "SecretMissing",
        ),
    ],
)
def test_the_status_of_a_model(
    observed: ModelObservation, phase: str, type_: str, reason: str
) -> None:
    facts = facts_of(observed)
    assert phase_of(observed.model, facts) == phase
    assert {str(fact.type): str(fact.reason) for fact in facts}[type_] == reason


def of_kuberay(**changed: Any) -> dict[str, Fact]:
    ray = model(runtime="RayService")
    return {str(f.type): f for f in facts_of(seen(model=ray, **changed))}


def test_a_model_for_kuberay_says_whether_it_is_there() -> None:
    missing = of_kuberay(kuberay=False)
    assert missing["KubeRayMissing"].holds
    assert missing["Ready"].reason == Reason.KUBERAY_NOT_INSTALLED
    held = of_kuberay(workload={"kind": "RayService"}, report=report(), upgrade=HELD)
    assert not held["KubeRayMissing"].holds
    assert held["Ready"].reason == Reason.HELD_BACK


def test_a_report_that_cannot_be_read_is_none() -> None:
    for body in (b"", b"[]", b'{"version": 2}', b'{"ready": "perhaps"}'):
        found = read_report(body)
        assert not found.reachable
        assert "cannot be read" in found.message
    assert read_report(b'{"laterField": 1}').reachable


def test_an_adapter_counts_where_every_replica_that_draws_has_it() -> None:
    ready, loading = AdapterState(state="ready"), AdapterState(state="loading")
    states = (
        ReplicaState(replica="r1", ready=True, adapters={"a": ready, "b": ready}),
        ReplicaState(replica="r2", ready=True, adapters={"a": ready, "b": loading}),
        ReplicaState(replica="r3", ready=False),
    )
    found = ModelReport(ModelAppStatus(replica_states=states))
    assert found.loaded_everywhere(frozenset("abc")) == 1
    assert found.knows("b") and not found.knows("c")
    assert found.ready_replicas == 2


@pytest.mark.parametrize(
    ("now", "before", "shown"),
    [(40, None, 40), (41, 40, 40), (50, 40, 50), (1, 0, 1), (0, 1, 0)],
)
def test_small_changes_of_the_queue_are_not_written(
    now: float, before: float | None, shown: float
) -> None:
    assert queue_field(report(queue=now), before) == shown


def test_weights_are_fetched_again_only_for_another_source() -> None:
    first = plan_weights(model(source=HUB), {})
    assert (first.ready, first.to_fetch) == (None, True)
    status = {"sourceHash": first.source_hash, "weightsPath": "/w", "resolvedRevision": "r1"}
    assert plan_weights(model(source=HUB), status).current
    other = {"huggingFace": {"repo": "acme/flux", "revision": "v2"}}
    changed = plan_weights(model(source=other), status)
    assert (changed.current, changed.to_fetch, changed.ready) == (False, True, Weights("/w", "r1"))


def test_a_cache_is_shared_by_nodes_where_there_are_several() -> None:
    cache = {"cache": {"persistentVolumeClaim": {"size": "10Gi", "storageClassName": "fast"}}}
    modes = {}
    for runtime in ("SinglePod", "RayService"):
        obj = owner("ImageModel", "shapes")
        claim = build_claim(obj, model(runtime=runtime, **cache), settings())
        assert claim is not None
        assert claim["spec"]["storageClassName"] == "fast"
        modes[runtime] = claim["spec"]["accessModes"]
    assert modes == {"SinglePod": ["ReadWriteOnce"], "RayService": ["ReadWriteMany"]}


@pytest.mark.parametrize(
    ("status", "created", "reason"),
    [
        ({"phase": "Bound"}, "2026-11-23T09:00:00Z", None),
        ({"phase": "Pending"}, "2026-11-23T09:04:00Z", None),
        ({"phase": "Pending"}, "2026-11-23T09:00:00Z", "VolumeNotBound"),
        ({"phase": "Lost"}, "2026-11-23T09:04:00Z", "VolumeNotBound"),
    ],
)
def test_a_volume_that_waits_for_long_is_a_problem(
    status: Manifest, created: str, reason: str | None
) -> None:
    claim = {"metadata": {"creationTimestamp": created}, "status": status}
    found = volume_problem({"data": claim}, NOW, settings())
    assert (found and str(found.reason)) == reason
    missing = volume_problem({"data": None}, NOW, settings())
    assert missing is not None and missing.reason == Reason.VOLUME_MISSING


# --- teams and the gateway ----------------------------------------------------------------------


def declared(teams: list[Manifest], **policies: float) -> Declared:
    return Declared(
        {(t["metadata"]["namespace"], t["metadata"]["name"]): t for t in teams},
        {("calotype", name): policy(block) for name, block in policies.items()},
        {("calotype", "shapes"): model()},
        settings(),
    )


@pytest.mark.parametrize(
    ("spec", "policies", "reason"),
    [
        ({}, {}, None),
        ({"moderationPolicyRef": {"name": "kids"}}, {"default": 0.5, "kids": 0.2}, None),
        ({"moderationPolicyRef": {"name": "kids"}}, {"default": 0.5, "kids": 0.9}, "PolicyLaxer"),
        ({"moderationPolicyRef": {"name": "kids"}}, {"default": 0.5}, "PolicyMissing"),
    ],
)
def test_a_team_may_only_have_a_stricter_policy(
    spec: Manifest, policies: dict[str, float], reason: str | None
) -> None:
    around = declared([owner("Team", "shoes", **spec)], **policies)
    refusal = team_refusal(around, ("calotype", "shoes"), team(**spec))
    assert (refusal and str(refusal.reason)) == reason
    beside = policies_beside(around, model(), [])
    assert set(beside) == ({"kids"} if spec and reason is None else set())


def test_the_older_of_two_teams_of_one_name_has_it() -> None:
    old, young = owner("Team", "shoes"), owner("Team", "shoes", "other")
    young["metadata"]["creationTimestamp"] = "2026-11-23T09:00:09Z"
    around = declared([old, young])
    assert team_refusal(around, ("calotype", "shoes"), team()) is None
    refusal = team_refusal(around, ("other", "shoes"), team(namespace="other"))
    assert refusal is not None and refusal.reason == Reason.NAME_CONFLICT


def test_gateways_are_told_everything_by_one_name() -> None:
    manifest = model_manifest(model("zebra"), Weights("/w"))
    paid = model(
        "paid",
        source={"provider": {"name": "openai", "model": "gpt-image-1"}},
        credentialsSecretRef={"name": "openai"},
    )
    strict = {"moderationPolicyRef": {"name": "strict"}}
    striped = adapter_manifest(adapter("stripes", "shoes", **strict), Weights("/a", "r1", "b" * 64))
    document = build_gateway_config(
        [
            ModelEntry(manifest, "http://zebra.calotype.svc:8000", True),
            ModelEntry(model_manifest(paid, None), None, False),
        ],
        [striped],
        settings(),
    )
    teams = build_gateway_teams(
        [
            TeamEntry(team("shoes", "shoes", **strict), "u1", ["c" * 64]),
            TeamEntry(team("bags", "shoes", **strict), "u2", [], "Its policy is laxer."),
        ],
        settings(),
    )
    text = build_config_map("any", "gateway.json", document, settings())["data"]["gateway.json"]
    read = GatewayConfig.model_validate_json(text)
    assert [(m.manifest.name, m.url is None, m.ready) for m in read.models] == [
        ("paid", True, False),
        ("zebra", False, True),
    ]
    assert read.models[1].manifest.spec.source.path == "/w"
    (found,) = read.adapters
    assert found.spec.moderation_policy_ref is not None
    assert found.spec.moderation_policy_ref.name == "strict.shoes"
    bags, shoes = GatewayTeams.model_validate_json(teams.to_json()).teams
    assert (bags.uid, shoes.uid) == ("u2", "u1")
    assert (shoes.moderation_policy, shoes.refusal, shoes.key_hashes) == (
        "strict.shoes",
        None,
        ["c" * 64],
    )
    assert (bags.moderation_policy, bags.refusal) == (None, "Its policy is laxer.")

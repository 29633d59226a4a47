"""A model as a RayService or as one pod, and a training as a RayJob: pure builders."""

from __future__ import annotations

import copy
import json
from base64 import b64decode
from typing import Any

import pytest

from calotype.operator.kube.objects import Manifest
from calotype.operator.manifests import rayservice, singlepod
from calotype.operator.manifests.application import (
    build_application,
    config_hash,
    generator_config,
    gpu_shares,
    serve_config,
)
from calotype.operator.manifests.custom_resources import (
    Weights,
    adapter_manifest,
    model_manifest,
)
from calotype.operator.manifests.model_secret import MARKS, TOKEN, build_model_secret
from calotype.operator.manifests.pods import Volumes
from calotype.operator.manifests.trainingjob import (
    build_adapter,
    build_rayjob,
    read_job,
    training_volumes,
)
from calotype.operator.settings import ResourceProfile
from calotype.serving.wire.application import GeneratorConfig, ModeratorConfig, NamedPolicy
from calotype.serving.wire.config_hash import config_hash as hash_of
from calotype.serving.wire.model_token import marks_secret

from .parts import adapter, model, owner, settings, training

ONE, EIGHT = ResourceProfile(gpus=1), ResourceProfile(gpus=8)
OWN_ENCODER = {"textEncoder": {"resourceProfile": "gpu", "replicas": {"min": 1, "max": 2}}}


def cluster(image: str = "serve:1", **spec: Any) -> Manifest:
    shapes = model(resourceProfile="gpu", runtime="RayService", **spec)
    profile = settings().profile("gpu")
    assert profile is not None
    encoder = profile if shapes.spec.text_encoder is not None else None
    groups = rayservice.groups_of(shapes, profile, encoder)
    config = settings(serveImage=image, redis={"address": "redis:6379"})
    return rayservice.build_cluster("shapes", groups, Volumes(data="data"), config)


def groups_in(spec: Manifest) -> dict[str, Manifest]:
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def test_the_groups_of_a_cluster_have_whole_resources_and_the_bounds_of_the_model() -> None:
    found = groups_in(cluster(replicas={"min": 2, "max": 5}, **OWN_ENCODER))
    bounds = {n: (g["minReplicas"], g["maxReplicas"], g["replicas"]) for n, g in found.items()}
    assert bounds == {"control": (1, 1, 1), "generator": (2, 5, 2), "text-encoder": (1, 2, 1)}
    for group in found.values():
        # Ray takes whole numbers only, as JSON inside of a shell's quotes.
        resources = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert all(isinstance(amount, int) for amount in resources.values())
    assert found["generator"]["rayStartParams"]["num-gpus"] == "1"


def test_the_head_runs_no_replica_and_keeps_its_state_in_redis() -> None:
    spec = cluster()
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["gcsFaultToleranceOptions"] == {"redisAddress": "redis:6379"}
    assert spec["authOptions"] == {"mode": "token"}


def test_a_hash_differs_only_where_kuberay_makes_a_second_cluster() -> None:
    before = cluster()
    assert rayservice.cluster_hash(cluster(replicas={"min": 3, "max": 8})) == (
        rayservice.cluster_hash(before)
    )
    tolerant = copy.deepcopy(before)
    tolerant["workerGroupSpecs"][0]["template"]["spec"]["tolerations"] = [{"key": "gpu"}]
    assert rayservice.cluster_hash(tolerant) == rayservice.cluster_hash(before)
    assert rayservice.cluster_hash(cluster("serve:2")) != rayservice.cluster_hash(before)


def test_the_gpus_of_a_cluster_are_counted_with_its_replicas() -> None:
    assert rayservice.gpus_of(cluster(replicas={"min": 3, "max": 8})) == {"nvidia.com/gpu": 3}
    assert rayservice.gpus_of(cluster(replicas={"min": 0, "max": 8})) == {}


@pytest.mark.parametrize(("now", "target"), [(1, 3), (3, 3), (5, 5), (9, 8)])
def test_a_running_cluster_is_patched_to_the_bounds_and_no_further(now: int, target: int) -> None:
    running = {"spec": cluster(replicas={"min": 1, "max": 9})}
    groups_in(running["spec"])["generator"]["replicas"] = now
    wanted = cluster(replicas={"min": 3, "max": 8})
    patch = rayservice.replica_patch(running, wanted)
    assert patch is not None
    index = [g["groupName"] for g in running["spec"]["workerGroupSpecs"]].index("generator")
    path = f"/spec/workerGroupSpecs/{index}"
    assert patch[0] == {"op": "test", "path": f"{path}/groupName", "value": "generator"}
    changed = {p["path"].rpartition("/")[2]: p["value"] for p in patch[1:]}
    assert changed == {"minReplicas": 3, "maxReplicas": 8} | (
        {"replicas": target} if target != now else {}
    )
    assert rayservice.replica_patch({"spec": wanted}, wanted) is None


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("NewCluster", "NewCluster"), ("InPlaceOnly", "None"),
     ("Incremental", "NewClusterWithIncrementalUpgrade")],
)  # fmt: skip
def test_a_ray_service_has_the_strategy_of_its_model(strategy: str, kind: str) -> None:
    shapes = model(runtime="RayService", upgradeStrategy=strategy, suspend=True)
    obj = owner("ImageModel", "shapes")
    config = settings(gatewayClassName="envoy")
    service = rayservice.build_rayservice(obj, shapes, [], "{}", Volumes(), config)
    spec = service["spec"]
    assert spec["upgradeStrategy"]["type"] == kind
    assert spec["suspend"] is True
    assert [o["uid"] for o in service["metadata"]["ownerReferences"]] == ["uid-shapes"]
    kept = {"workerGroupSpecs": [], "rayVersion": "old"}
    held = rayservice.build_rayservice(obj, shapes, [], "{}", Volumes(), config, cluster=kept)
    assert held["spec"]["rayClusterConfig"] == kept


@pytest.mark.parametrize(("suspended", "replicas"), [(False, 1), (True, 0)])
def test_one_pod_is_selected_by_its_service_and_restricted(suspended: bool, replicas: int) -> None:
    obj = owner("ImageModel", "shapes")
    deployment = singlepod.build_deployment(
        obj, ONE, Volumes(data="data", cache="c"), settings(), suspended=suspended
    )
    spec = deployment["spec"]
    assert spec["replicas"] == replicas
    assert spec["strategy"] == {"type": "Recreate"}
    service = singlepod.build_service(obj, settings())
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsNonRoot"] is True
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_audit_logs_lie_on_their_claim_where_a_moderator_writes_them() -> None:
    config = settings(auditClaim="calotype-audit")
    shapes, claim = model(resourceProfile="gpu", runtime="RayService"), "calotype-audit"
    groups = rayservice.groups_of(shapes, config.profile("gpu") or ONE, None)
    ray = rayservice.build_cluster("shapes", groups, Volumes(), config)
    pods = {group["groupName"]: group["template"] for group in ray["workerGroupSpecs"]}
    one = singlepod.build_deployment(
        owner("ImageModel", "shapes"), ONE, Volumes(), config, suspended=False
    )
    pods |= {"head": ray["headGroupSpec"]["template"], "one": one["spec"]["template"]}
    where = {name: claim in json.dumps(pod) for name, pod in pods.items()}
    assert where == {"control": True, "generator": False, "head": False, "one": True}
    for name in ("control", "one"):
        (container,) = pods[name]["spec"]["containers"]
        mount = {"name": "audit", "mountPath": "/var/lib/calotype/audit"}
        assert mount in container["volumeMounts"]


def application(**spec: Any) -> Manifest:
    shapes = model(**spec)
    striped = adapter_manifest(adapter(), Weights("/adapters/stripes", "r1", "a" * 64))
    policy = ModeratorConfig(policy=NamedPolicy(name="strict", spec={"version": 1}))
    manifest = model_manifest(shapes, Weights("/models/shapes"))
    built = build_application(shapes, manifest, [striped], policy, ONE, None, groups=True)
    return dict(built)


def test_replicas_are_told_where_the_weights_lie() -> None:
    found = GeneratorConfig.model_validate(generator_config(application()))
    assert found.model.spec.source.path == "/models/shapes"
    (striped,) = found.adapters
    assert (striped.spec.source.path, striped.spec.sha256) == ("/adapters/stripes", "a" * 64)
    deployments = {d["name"]: d for d in application()["deployments"]}
    assert deployments["Moderator"]["user_config"]["policy"]["name"] == "strict"
    assert "user_config" not in deployments["Ingress"]
    assert deployments["Dispatcher"]["user_config"]["maxOutageSeconds"] == 900


def test_the_hash_of_an_application_is_the_one_that_its_replicas_compute() -> None:
    built = application(defaults={"guidanceScale": 4.0})
    received = json.loads(serve_config(built).replace("4.0", "4"))["applications"][0]
    assert hash_of(generator_config(received)) == config_hash(built)
    assert config_hash(application(defaults={"guidanceScale": 5.0})) != config_hash(built)


def test_a_model_that_scales_to_zero_says_when() -> None:
    spec = {
        "replicas": {"min": 0, "max": 2},
        "autoscaling": {"scaleToZeroAfterSeconds": 60},
    }
    generator = next(d for d in application(**spec)["deployments"] if d["name"] == "Generator")
    scaling = generator["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"]) == (0, 1)
    assert scaling["downscale_to_zero_delay_s"] == 60


@pytest.mark.parametrize(
    ("profile", "encoder", "shares"),
    [
        (ONE, None, (0.75, 0.25)),
        (EIGHT, None, (7.0, 1.0)),
        (EIGHT, ONE, (8.0, 1.0)),
        (ResourceProfile(), None, (0.0, 0.0)),
    ],
)
def test_a_text_encoder_shares_the_gpus_of_its_replica(
    profile: ResourceProfile, encoder: ResourceProfile | None, shares: tuple[float, float]
) -> None:
    assert gpu_shares(profile, encoder) == shares


def test_a_training_is_a_ray_job_that_ends_with_its_cluster() -> None:
    job = build_rayjob(
        owner("LoRATraining", "sneaker"), training(suspend=True, activeDeadlineSeconds=900),
        ONE, settings(),
    )  # fmt: skip
    spec = job["spec"]
    assert spec["entrypoint"] == "calotype train lora --config /etc/calotype/training/training.json"
    assert (spec["suspend"], spec["shutdownAfterJobFinishes"]) == (True, True)
    assert spec["activeDeadlineSeconds"] == 900
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["rayStartParams"] == {"num-gpus": "1"}
    names = {v["name"] for v in group["template"]["spec"]["volumes"]}
    assert {"source", "config"} <= names


@pytest.mark.parametrize(
    ("output", "source"),
    [
        (None, {"path": "/var/lib/calotype/cache/trainings/calotype/sneaker/adapter.safetensors"}),
        (
            {"s3": {"uri": "s3://loras/acme/"}},
            {"s3": {"uri": "s3://loras/acme/sneaker/adapter.safetensors"}},
        ),
        (
            {"persistentVolumeClaim": {"claimName": "o", "path": "a"}},
            {
                "persistentVolumeClaim": {
                    "claimName": "o",
                    "path": "a/sneaker/adapter.safetensors",
                }
            },
        ),
    ],
)
def test_the_adapter_of_a_training_comes_from_where_it_was_written(
    output: Manifest | None, source: Manifest
) -> None:
    spec: Manifest = {"caption": {"triggerWord": "acme"}} | ({"output": output} if output else {})
    made = build_adapter(training(**spec), settings())["spec"]
    assert made["source"] == source
    assert made["triggerWords"] == ["acme"]


@pytest.mark.parametrize(
    ("status", "suspended", "phase"),
    [
        ({}, False, "Starting"),
        ({"jobDeploymentStatus": "Running"}, False, "Running"),
        ({"jobDeploymentStatus": "Suspended"}, True, "Suspended"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, False, "Succeeded"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "FAILED"}, False, "Failed"),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no GPU"}, False, "Failed"),
    ],
)
def test_the_phase_of_a_training(status: Manifest, suspended: bool, phase: str) -> None:
    state = read_job({"status": status}, suspended)
    assert state.phase == phase
    assert (state.failure is not None) == (phase == "Failed")
    assert state.succeeded.holds == (phase == "Succeeded")


def test_a_training_sees_the_releases_volume_in_the_releases_namespace_alone() -> None:
    seen = {
        place: training_volumes(training(namespace=place), settings())
        for place in ("calotype", "shoes")
    }
    assert [volumes.source for volumes in seen.values()] == ["photos", "photos"]
    assert {place: volumes.data for place, volumes in seen.items()} == {
        "calotype": "data",
        "shoes": None,
    }


def test_the_secret_of_a_model_holds_what_follows_from_the_internal_token_never_itself() -> None:
    built = [
        build_model_secret(owner("ImageModel", name), "the-internal-token", settings())["data"]
        for name in ("shapes", "others")
    ]
    held = [{key: b64decode(value).decode() for key, value in data.items()} for data in built]
    assert all("the-internal-token" not in value for data in held for value in data.values())
    assert held[0][TOKEN] != held[1][TOKEN], "each model has a token of its own"
    assert held[0][MARKS] == held[1][MARKS] == marks_secret("the-internal-token")

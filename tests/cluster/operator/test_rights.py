"""Least privilege: the operator uses every right that the chart gives it, and asks for no other."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.operator.operator_process import (
    OperatorProcess,
    operator_rights,
    running_operator,
)
from cluster.operator.resources import adapter, model, resource
from cluster.operator.simulated_pods import SimulatedPods
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from controlplane.fixtures import foreign

from calotype.operator.testing.cluster import good_fetch

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

Right = tuple[str, str, str]
"""API group, resource (with its subresource), verb."""
HUB = {"huggingFace": {"repo": "acme/weights"}}
CACHE = {"persistentVolumeClaim": {"size": "1Gi"}}


POLICY = resource(
    "ModerationPolicy", "house", version=1, categories={"hate": {"text": {"block": 0.5}}}
)
TRAINING = resource(
    "LoRATraining",
    "sneaker",
    modelRef={"name": "shapes"},
    dataset={"http": {"url": "https://example.com/photos.zip"}},
)


class OperatorExercise:
    """A namespace in which the operator has occasion to do everything that it ever does."""

    def __init__(self, cluster: Cluster, operator: OperatorProcess, pods: SimulatedPods) -> None:
        self.cluster, self.operator, self.pods = cluster, operator, pods
        self.namespace = operator.namespace

    def apply(self, *objects: Object) -> None:
        self.cluster.apply_objects(*objects, namespace=self.namespace)

    def wait(self, kind: str, name: str, holds: str | Callable[[Object], Any] = "Ready") -> Object:
        return self.cluster.wait(kind, name, holds, self.namespace)

    def secret(self, name: str, **data: str) -> None:
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
        meta = {"name": name}
        self.apply({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": encoded})

    def use_every_right(self) -> None:
        """Models of all kinds, adapters, a policy, a team, a training; changed and deleted."""
        cluster, namespace = self.cluster, self.namespace
        self.secret("hub", HF_TOKEN="t")
        self.apply(
            POLICY,
            resource("Team", "shoes"),
            model("shapes", source=HUB, cache=CACHE, moderationPolicyRef={"name": "house"}),
            resource("ImageModel", "ray", source={"builtIn": {"name": "shapes"}}),
        )
        self.wait("imagemodels", "shapes")
        self.wait("moderationpolicies", "house")
        self.wait("teams", "shoes")
        self.apply(
            adapter("sneaker-hub", "shapes", source=HUB, credentialsSecretRef={"name": "hub"}),
            adapter("stripes", "shapes"),
            TRAINING,
            resource("Team", "shoes", keys={"rotate": 1}),
        )
        self.wait("loraadapters", "sneaker-hub")
        self.wait("teams", "shoes", lambda t: t["status"].get("rotation") == "1")
        self._ray()
        self._training()
        self._former()
        for kind, name in (
            ("moderationpolicies", "house"),
            ("teams", "shoes"),
            ("loratrainings", "sneaker"),
        ):
            old = {"metadata": {"finalizers": ["calotype.dev/cleanup"]}}
            cluster.patch(kind, name, old, namespace)
            cluster.delete(kind, name, namespace)
            cluster.wait_gone(kind, name, namespace)
        for kind in ("loraadapters", "imagemodels"):
            cluster.delete_all(kind, namespace)

    def _ray(self) -> None:
        """What KubeRay would make, and what it would say when it gives up."""
        service = self.wait("rayservices", "model-ray", lambda s: s["spec"])
        spec = json.loads(json.dumps(service["spec"]["rayClusterConfig"]))
        labels = {
            "ray.io/originated-from-cr-name": "model-ray",
            "ray.io/originated-from-crd": "RayService",
        }
        for group in spec["workerGroupSpecs"]:
            group["maxReplicas"] = 1
        owner = {key: service[key] for key in ("apiVersion", "kind")}
        owner |= {key: service["metadata"][key] for key in ("name", "uid")}
        metadata = {"name": "ray-abcde", "labels": labels, "ownerReferences": [owner]}
        self.apply(
            {
                "apiVersion": "ray.io/v1",
                "kind": "RayCluster",
                "metadata": metadata,
                "spec": spec,
            }
        )
        source = {"builtIn": {"name": "shapes"}}
        self.apply(resource("ImageModel", "ray", source=source, replicas={"min": 1, "max": 3}))

        def told(cluster: Object) -> bool:
            return any(g["maxReplicas"] == 3 for g in cluster["spec"]["workerGroupSpecs"])

        self.wait("rayclusters", "ray-abcde", told)
        gave_up = {
            "type": "Ready",
            "status": "False",
            "reason": "InitializingTimeout",
            "message": "",
            "lastTransitionTime": "2026-11-23T09:00:00Z",
        }
        uid = service["metadata"]["uid"]
        status = {"status": {"conditions": [gave_up]}}
        self.cluster.patch("rayservices", "model-ray", status, self.namespace, sub="status")
        self.wait("rayservices", "model-ray", lambda s: s["metadata"]["uid"] != uid)

    def _former(self) -> None:
        """What an earlier release made under the bare name of a model that becomes ready now."""
        waiting = {"source": HUB, "credentialsSecretRef": {"name": "late"}}
        self.apply(model("former", **waiting))
        made = self.wait("imagemodels", "former", lambda m: m.get("status"))
        owner = {key: made[key] for key in ("apiVersion", "kind")}
        owner |= {key: made["metadata"][key] for key in ("name", "uid")}
        metadata = {"name": "former", "ownerReferences": [owner]}
        labels = {"app": "former"}
        pods = {"containers": [{"name": "serve", "image": "serve:1"}]}
        deployment = {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pods},
        }
        monitor = {"selector": {"matchLabels": labels}, "podMetricsEndpoints": []}
        for version, kind, spec in (
            ("v1", "Service", {"ports": [{"port": 8000}]}),
            ("apps/v1", "Deployment", deployment),
            ("monitoring.coreos.com/v1", "PodMonitor", monitor),
        ):
            self.apply({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec})
        self.secret("late", HF_TOKEN="t")
        self.wait("imagemodels", "former")
        for kind in ("services", "deployments", "podmonitors"):
            self.cluster.wait_gone(kind, "former", self.namespace)

    def _training(self) -> None:
        self.wait("rayjobs", "train-sneaker", lambda j: j["spec"])
        self.cluster.patch("loratrainings", "sneaker", {"spec": {"suspend": True}}, self.namespace)
        self.wait("rayjobs", "train-sneaker", lambda j: j["spec"]["suspend"])
        ended = {"status": {"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete"}}
        self.cluster.patch("rayjobs", "train-sneaker", ended, self.namespace, sub="status")
        self.wait("loratrainings", "sneaker")


@pytest.fixture(scope="module")
def exercise(
    kinds: Cluster,
    cluster_binaries: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OperatorExercise]:
    if foreign():
        pytest.skip("the audit log of a cluster that is not ours cannot be read")
    folder = tmp_path_factory.mktemp("rights")
    with running_operator(kinds, cluster_binaries["helm"], folder) as (operator, pods):
        pods.fetch = good_fetch
        yield OperatorExercise(kinds, operator, pods)


def rights_of(rules: list[Object]) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def calls(exercise: OperatorExercise) -> list[Object]:
    """The operator's calls on resources, as the API server logged them."""
    return [
        event
        for event in exercise.cluster.processes.audit(exercise.operator.user)
        if "objectRef" in event
    ]


def right_of(call: Object) -> Right:
    ref = call["objectRef"]
    sub = f"/{ref['subresource']}" if ref.get("subresource") else ""
    return ref.get("apiGroup", ""), f"{ref['resource']}{sub}", call["verb"]


def roles(exercise: OperatorExercise, folder: Path, helm: Path) -> list[Object]:
    rendered = operator_rights(helm, folder, exercise.namespace)
    return [obj for obj in rendered if obj["kind"] == "Role"]


def test_the_chart_gives_exactly_what_is_used_and_nothing_is_denied(
    exercise: OperatorExercise, cluster_binaries: dict[str, Path], tmp_path: Path
) -> None:
    exercise.operator.start(lease=True)
    exercise.use_every_right()
    assert exercise.operator.stop() == 0
    used: set[Right] = set()
    for call in calls(exercise):
        code = call.get("responseStatus", {}).get("code")
        assert code not in (401, 403), f"denied: {right_of(call)} {call['requestURI']}"
        used.add(right_of(call))
        if call["verb"] == "patch" and code == 201:  # an apply that made the object
            group, resource, _ = right_of(call)
            used.add((group, resource, "create"))
    given: set[Right] = set()
    for role in roles(exercise, tmp_path, cluster_binaries["helm"]):
        given |= rights_of(role["rules"])
    assert given - used == set(), "given and never used"
    assert used - given == set(), "used and never given"


def allows(exercise: OperatorExercise, right: Right) -> bool:
    """Whether the API server lets the operator's account do this."""
    group, resource, verb = right
    kind, _, sub = resource.partition("/")
    asked = {"group": group, "resource": kind, "subresource": sub, "verb": verb}
    spec = {"user": exercise.operator.user, "resourceAttributes": asked}
    asked["namespace"] = exercise.namespace
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    url = exercise.cluster.path("subjectaccessreviews", None)
    answer = exercise.cluster.api.post(url, json=review).raise_for_status()
    return bool(answer.json()["status"]["allowed"])


def test_without_any_one_rule_something_is_denied(
    exercise: OperatorExercise, cluster_binaries: dict[str, Path], tmp_path: Path
) -> None:
    """No rule repeats another one. The operator asks for every right (see the test before), so it
    is denied something as soon as one of them is gone."""
    rules = 0
    for role in roles(exercise, tmp_path, cluster_binaries["helm"]):
        for missing in role["rules"]:
            rules += 1
            rights = rights_of([missing])
            given = lambda rights=rights: all(allows(exercise, right) for right in rights)  # noqa: E731
            exercise.cluster.until(given, f"{missing} is given")
            left = [rule for rule in role["rules"] if rule is not missing]
            exercise.apply({**role, "rules": left})
            gone = lambda rights=rights: not any(allows(exercise, right) for right in rights)  # noqa: E731
            exercise.cluster.until(gone, f"{missing} is taken away")
            exercise.apply(role)
    assert rules >= 10

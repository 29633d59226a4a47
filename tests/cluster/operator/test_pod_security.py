"""Every pod that the operator has made, by whomever, passes Pod Security `restricted`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.operator.operator_process import OperatorProcess, running_operator
from cluster.operator.resources import resource
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ENCODER = {"resourceProfile": "a100", "replicas": {"min": 1, "max": 2}}


@pytest.fixture
def operator(
    kinds: Cluster, cluster_binaries: dict[str, Path], tmp_path: Path
) -> Iterator[OperatorProcess]:
    with running_operator(kinds, cluster_binaries["helm"], tmp_path) as (operator, _):
        operator.start()
        yield operator


def templates(cluster: Cluster, namespace: str) -> dict[str, Object]:
    """The pods of Ray clusters, which KubeRay makes, and those of Kubernetes' own controllers.

    The pod of a fetch Job was let in already where the model that waits for it has its Deployment.
    """
    found: dict[str, Object] = {}
    for kind, field in (("rayservices", "rayClusterConfig"), ("rayjobs", "rayClusterSpec")):
        for obj in cluster.items(kind, namespace):
            groups = {"head": obj["spec"][field]["headGroupSpec"]}
            for group in obj["spec"][field].get("workerGroupSpecs", []):
                groups[group["groupName"]] = group
            for group, spec in groups.items():
                found[f"{kind}-{obj['metadata']['name']}-{group}"] = spec["template"]
            submitter = obj["spec"].get("submitterPodTemplate")
            if submitter is not None:
                found[f"{kind}-{obj['metadata']['name']}-submitter"] = submitter
    for kind in ("deployments", "jobs"):
        for obj in cluster.items(kind, namespace):
            found[f"{kind}-{obj['metadata']['name']}"] = obj["spec"]["template"]
    return found


def test_pods_of_models_fetches_and_trainings_are_restricted(
    kinds: Cluster, operator: OperatorProcess
) -> None:
    namespace = operator.namespace
    shapes = {"builtIn": {"name": "shapes"}}
    hub = {"huggingFace": {"repo": "acme/flux"}}
    dataset = {"http": {"url": "https://example.com/photos.zip"}}
    kinds.apply_objects(
        *[
            resource(
                "ImageModel", "ray", source=shapes, textEncoder=ENCODER, resourceProfile="a100"
            ),
            resource("ImageModel", "pod", source=shapes, runtime="SinglePod"),
            resource("LoRATraining", "sneaker", modelRef={"name": "pod"}, dataset=dataset),
            resource(
                *("ImageModel", "hub"),
                source=hub,
                runtime="SinglePod",
                cache={"persistentVolumeClaim": {"size": "1Gi"}},
            ),
        ],
        namespace=namespace,
    )
    for kind, name in (
        ("rayservices", "model-ray"),
        ("rayjobs", "train-sneaker"),
        ("deployments", "model-pod"),
    ):
        kinds.wait(kind, name, lambda found: found["spec"], namespace)
    kinds.wait("deployments", "model-hub", lambda found: found["spec"], namespace)
    found = templates(kinds, namespace)
    assert {name.split("-")[0] for name in found} >= {"rayservices", "rayjobs", "deployments"}
    assert {name for name in found if name.startswith("rayservices-model-ray-")} > {
        "rayservices-model-ray-head"
    }
    for name, template in found.items():
        pod: Object = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {**template["spec"], "restartPolicy": "Never"},
        }
        pod["spec"].pop("serviceAccountName", None)  # it is not there, and nobody asks for it here
        answer = kinds.dry_run(pod, namespace)
        assert (answer.message, answer.warnings) == ("", []), name

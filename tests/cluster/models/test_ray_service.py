"""An ImageModel with `runtime: RayService`: KubeRay's pods draw, keep their adapters, and follow
the manifest. Every pod really runs; KubeRay's operator is the stand-in unless one is given."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator

import pytest
import yaml
from cluster.models.release import Release, installed
from controlplane.client.objects import Object
from controlplane.processes.pod_cluster import PodCluster
from helm.rendering import CHART

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL: Object = yaml.safe_load((CHART.parent / "examples" / "imagemodel.yaml").read_text())
ADAPTER: Object = yaml.safe_load((CHART.parent / "examples" / "loraadapter.yaml").read_text())


def model(least: int) -> str:
    """The model of the examples on a Ray cluster, with the policy of the package."""
    spec = {**MODEL["spec"], "runtime": "RayService", "replicas": {"min": least, "max": 2}}
    spec["autoscaling"] = {"targetQueueSeconds": 1, "upscaleDelaySeconds": 1}
    del spec["moderationPolicyRef"]
    return json.dumps({**MODEL, "spec": spec})


@pytest.fixture(scope="module")
def release(pod_cluster: PodCluster) -> Iterator[Release]:
    with installed(pod_cluster, "--set", "defaultModel.enabled=false") as found:
        found.kubectl("apply", "-f", "-", stdin=model(least=1))
        found.wait("imagemodel/shapes")
        yield found


def pods(release: Release) -> dict[str, list[Object]]:
    """Group of the Ray cluster -> its pods."""
    found: dict[str, list[Object]] = {}
    for pod in release.pods("model"):
        found.setdefault(pod["metadata"]["labels"]["ray.io/group"], []).append(pod)
    return found


def uids(release: Release) -> set[str]:
    return {pod["metadata"]["uid"] for pod in release.pods("model")}


def is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def columns(release: Release, kind: str, name: str) -> list[str]:
    return release.kubectl("get", kind, name, "--no-headers").split()


def test_a_model_on_kuberay_draws(release: Release) -> None:
    assert {group: len(found) for group, found in pods(release).items()} == {
        "headgroup": 1,
        "control": 1,
        "generator": 1,
    }
    image = release.draw()
    assert len(image) == 3 * 128 * 128
    assert release.draw() == image


def test_an_adapter_is_loaded_without_a_restart(release: Release) -> None:
    before, plain = uids(release), release.draw()
    release.kubectl("apply", "-f", "-", stdin=json.dumps(ADAPTER))
    release.wait("loraadapter/stripes")
    assert "1/1" in columns(release, "loraadapter", "stripes")
    assert release.draw([{"id": "stripes", "scale": 1.0}]) != plain
    assert uids(release) == before


def test_more_generators_come_where_work_waits(release: Release) -> None:
    before, plain = uids(release), release.draw()
    striped = release.draw([{"id": "stripes", "scale": 1.0}])
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(release.draw, None, steps=50, size="320x320") for _ in range(24)]
        two = lambda: len(pods(release)["generator"]) == 2  # noqa: E731
        release.cluster.until(two, "the autoscaler has made a second pod for the queue", 240)
        images = {future.result(timeout=300) for future in waiting}
    assert len(images) == 1
    # The manifest can hold what the queue asked for; nothing is restarted for it.
    release.kubectl("apply", "-f", "-", stdin=model(least=2))
    for kind, name in (("imagemodel", "shapes"), ("loraadapter", "stripes")):
        complete = lambda kind=kind, name=name: "2/2" in columns(release, kind, name)  # noqa: E731
        release.cluster.until(complete, f"two generators have the {kind}", 240)
    assert before < uids(release)
    for _ in range(4):
        assert release.draw() == plain
        assert release.draw([{"id": "stripes", "scale": 1.0}]) == striped


def test_a_generator_that_dies_is_replaced_with_its_adapters(release: Release) -> None:
    striped = release.draw([{"id": "stripes", "scale": 1.0}])
    dead = pods(release)["generator"][0]["metadata"]
    release.kubectl("delete", "pod", dead["name"], "--grace-period=0", "--force")
    assert release.draw([{"id": "stripes", "scale": 1.0}]) == striped  # by the other one

    def replaced() -> bool:
        there = pods(release)["generator"]
        return (
            len(there) == 2
            and all(pod["metadata"]["uid"] != dead["uid"] and is_ready(pod) for pod in there)
            and "2/2" in columns(release, "imagemodel", "shapes")
            and "2/2" in columns(release, "loraadapter", "stripes")
        )

    release.cluster.until(replaced, "another generator has come in its place", 300)
    assert release.draw([{"id": "stripes", "scale": 1.0}]) == striped


def test_what_is_deleted_is_gone(release: Release) -> None:
    for kind, name in (("loraadapter", "stripes"), ("imagemodel", "shapes")):
        release.kubectl("delete", kind, name, "--timeout=180s")
    for kind in ("rayservices", "rayclusters", "services", "pods"):
        release.cluster.until(
            lambda kind=kind: not release.named(kind, "shapes"), f"the model's {kind} are gone", 120
        )

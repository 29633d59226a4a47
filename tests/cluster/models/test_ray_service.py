"""An ImageModel with `runtime: RayService`: KubeRay's pods draw, keep their adapters, and follow
the manifest. Every pod really runs; KubeRay's operator is the stand-in unless one is given."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import pytest
import yaml
from cluster.models.release import Release
from controlplane.client.objects import Object
from helm.rendering import CHART

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL: Object = yaml.safe_load((CHART.parent / "examples" / "imagemodel.yaml").read_text())
ADAPTER: Object = yaml.safe_load((CHART.parent / "examples" / "loraadapter.yaml").read_text())


NAME = "shapes-ray"
STRIPED: list[Object] = [{"id": "stripes-ray", "scale": 1.0}]
SECONDS = 600.0
"""For a pod of Ray to come and load its model on a machine that is busy with others."""


def model(least: int) -> Object:
    """The model of the examples on a Ray cluster, with the policy of the package."""
    spec = {**MODEL["spec"], "runtime": "RayService", "replicas": {"min": least, "max": 2}}
    spec["autoscaling"] = {"targetQueueSeconds": 1, "upscaleDelaySeconds": 1}
    del spec["moderationPolicyRef"], spec["aliases"]
    return {**MODEL, "metadata": {"name": NAME}, "spec": spec}


def adapter() -> Object:
    spec = {**ADAPTER["spec"], "modelRef": {"name": NAME}}
    return {**ADAPTER, "metadata": {"name": "stripes-ray"}, "spec": spec}


@pytest.fixture(scope="module")
def rays(release: Release) -> Iterator[Release]:
    """The release with a model on a Ray cluster that is Ready. The tests change it in order."""
    release.cluster.apply_objects(model(least=1), namespace=release.namespace)
    release.wait(f"imagemodel/{NAME}")
    yield release
    for kind, name in (("loraadapter", "stripes-ray"), ("imagemodel", NAME)):
        release.cluster.delete(kind, name, release.namespace)
    release.cluster.wait_gone("imagemodel", NAME, release.namespace, SECONDS)


def draw(release: Release, loras: list[Object] | None = None, **more: object) -> bytes:
    return release.draw(loras, NAME, **more)


def pods(release: Release) -> dict[str, list[Object]]:
    """Group of the Ray cluster -> its pods."""
    found: dict[str, list[Object]] = {}
    for pod in release.pods("model", NAME):
        found.setdefault(pod["metadata"]["labels"]["ray.io/group"], []).append(pod)
    return found


def uids(release: Release) -> set[str]:
    return {pod["metadata"]["uid"] for pod in release.pods("model", NAME)}


def is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def serving(release: Release) -> list[str]:
    """How many generators have the model, and how many its adapter: ready/wanted."""
    found = release.cluster.get("imagemodel", NAME, release.namespace)["status"]
    loaded = release.cluster.get("loraadapter", "stripes-ray", release.namespace)["status"]
    return [found["serving"], loaded["loaded"]]


def test_a_model_on_kuberay_draws(rays: Release) -> None:
    assert {group: len(found) for group, found in pods(rays).items()} == {
        "headgroup": 1,
        "control": 1,
        "generator": 1,
    }
    image = draw(rays)
    assert len(image) == 3 * 128 * 128
    assert draw(rays) == image


def test_an_adapter_is_loaded_without_a_restart(rays: Release) -> None:
    before, plain = uids(rays), draw(rays)
    rays.cluster.apply_objects(adapter(), namespace=rays.namespace)
    rays.wait("loraadapter/stripes-ray")
    assert serving(rays) == ["1/1", "1/1"]
    assert draw(rays, STRIPED) != plain
    assert uids(rays) == before


def test_more_generators_come_where_work_waits(rays: Release) -> None:
    before, plain = uids(rays), draw(rays)
    striped = draw(rays, STRIPED)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(draw, rays, None, steps=50, size="320x320") for _ in range(24)]
        two = lambda: len(pods(rays)["generator"]) == 2  # noqa: E731
        rays.cluster.until(two, "the autoscaler has made a second pod for the queue", SECONDS)
        images = {future.result(timeout=SECONDS) for future in waiting}
    assert len(images) == 1
    [cluster] = rays.cluster.items("rayclusters", rays.namespace)
    account = f"system:serviceaccount:{rays.namespace}:{cluster['metadata']['name']}"
    assert "patch" in {call["verb"] for call in rays.cluster.processes.audit(account)}
    # The manifest can hold what the queue asked for; nothing is restarted for it.
    rays.cluster.apply_objects(model(least=2), namespace=rays.namespace)
    complete = lambda: serving(rays) == ["2/2", "2/2"]  # noqa: E731
    rays.cluster.until(complete, "two generators have model and adapter", SECONDS)
    assert before < uids(rays)
    for _ in range(4):
        assert draw(rays) == plain
        assert draw(rays, STRIPED) == striped


def test_a_generator_that_dies_is_replaced_with_its_adapters(rays: Release) -> None:
    striped = draw(rays, STRIPED)
    dead = pods(rays)["generator"][0]["metadata"]
    rays.kubectl("delete", "pod", dead["name"], "--grace-period=0", "--force")
    assert draw(rays, STRIPED) == striped  # by the other one

    def replaced() -> bool:
        there = pods(rays)["generator"]
        return (
            len(there) == 2
            and all(pod["metadata"]["uid"] != dead["uid"] and is_ready(pod) for pod in there)
            and serving(rays) == ["2/2", "2/2"]
        )

    rays.cluster.until(replaced, "another generator has come in its place", SECONDS)
    assert draw(rays, STRIPED) == striped


def test_what_is_deleted_is_gone(rays: Release) -> None:
    for kind, name in (("loraadapter", "stripes-ray"), ("imagemodel", NAME)):
        rays.cluster.delete(kind, name, rays.namespace)
        rays.cluster.wait_gone(kind, name, rays.namespace, SECONDS)
    for kind in ("rayservices", "rayclusters", "services", "pods"):
        rays.cluster.until(
            lambda kind=kind: not rays.named(kind, NAME), f"the model's {kind} are gone", SECONDS
        )

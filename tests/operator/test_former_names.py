"""After an upgrade nothing of an earlier release goes on under the names that it gave."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator

import pytest
from tests.operator import manifests
from tests.operator.virtual import World

from calotype.operator.kube.labels import owner_reference
from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    IMAGE_MODELS,
    LORA_TRAININGS,
    RAY_JOBS,
    RAY_SERVICES,
    SERVICES,
    Resource,
)

TRAINING: Manifest = {
    "apiVersion": "calotype.dev/v1alpha1",
    "kind": "LoRATraining",
    "metadata": {"name": "sneaker", "namespace": "calotype"},
    "spec": {
        "modelRef": {"name": "shapes"},
        "dataset": {"http": {"url": "https://example.com/photos.zip"}},
    },
}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    found = World()
    yield found
    await found.kill()
    await found.cluster.close()


def former(world: World, resource: Resource, owner: Manifest, **content: object) -> Manifest:
    """What an earlier release made, under the bare name of its owner."""
    metadata = {"name": owner["metadata"]["name"], "namespace": "calotype"}
    owned = {**metadata, "ownerReferences": [owner_reference(owner)]}
    return copy.deepcopy(world.server.objects.create(resource, {"metadata": owned, **content}))


@pytest.mark.parametrize(
    ("runtime", "workload"), [("SinglePod", DEPLOYMENTS), ("RayService", RAY_SERVICES)]
)
async def test_the_workload_of_an_earlier_release_goes_when_its_successor_is_ready(
    world: World, runtime: str, workload: Resource
) -> None:
    model = world.apply(manifests.model(runtime=runtime))
    for resource in (workload, SERVICES):
        former(world, resource, model, spec={})
    theirs = world.server.objects.create(
        CONFIG_MAPS, {"metadata": {"name": "shapes", "namespace": "calotype"}}
    )
    world.cluster.apps.silent = True
    await world.start()
    await world.until(lambda: world.find(workload, "model-shapes"), "the successor")
    await world.quiet(5)
    assert world.find(workload, "shapes") is not None, "it serves until then"
    world.cluster.apps.silent = False
    await world.ready(IMAGE_MODELS, "shapes")
    await world.quiet(5)
    assert world.find(workload, "shapes") is None and world.find(SERVICES, "shapes") is None
    assert world.find(workload, "model-shapes") is not None
    assert world.get(CONFIG_MAPS, "shapes") == theirs


async def test_what_only_has_the_name_is_left_alone(world: World) -> None:
    other = world.apply(manifests.model("other"))
    other["metadata"]["name"] = "shapes"
    world.apply(manifests.model())
    before = former(world, DEPLOYMENTS, other, spec={})
    await world.start()
    await world.ready(IMAGE_MODELS, "shapes")
    await world.quiet(5)
    assert world.get(DEPLOYMENTS, "shapes")["metadata"] == before["metadata"]


async def test_a_training_that_an_earlier_release_began_is_not_begun_twice(world: World) -> None:
    world.apply(manifests.model())
    training = world.apply(TRAINING)
    former(world, RAY_JOBS, training, spec={"suspend": False, "entrypoint": "train"})
    await world.start()
    await world.condition(LORA_TRAININGS, "sneaker", "Accepted")
    await world.until(
        lambda: world.status(LORA_TRAININGS, "sneaker").get("jobName") == "sneaker", "it goes on"
    )
    await world.quiet(5)
    assert world.find(RAY_JOBS, "train-sneaker") is None

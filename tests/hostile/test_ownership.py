"""The operator never changes what it does not own, however a custom resource is named."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable

import pytest
from tests.operator import manifests
from tests.operator.virtual import World

from calotype.operator.kube.labels import owner_reference, workload_name
from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import (
    CLAIMS,
    CONFIG_MAPS,
    DEPLOYMENTS,
    IMAGE_MODELS,
    JOBS,
    LORA_ADAPTERS,
    LORA_TRAININGS,
    RAY_CLUSTERS,
    RAY_JOBS,
    RAY_SERVICES,
    SERVICES,
    Resource,
)

CACHE = {"persistentVolumeClaim": {"size": "1Gi"}}
HUB = {"huggingFace": {"repo": "acme/flux"}}


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


def foreign(world: World, resource: Resource, name: str, **content: object) -> Manifest:
    """An object that somebody else made."""
    manifest = {"metadata": {"name": name, "namespace": "calotype"}, **content}
    return copy.deepcopy(world.server.objects.create(resource, manifest))


def written(obj: Manifest) -> Manifest:
    """All of an object but for what the cluster observes of it."""
    metadata = {k: v for k, v in obj["metadata"].items() if k != "resourceVersion"}
    return {**{k: v for k, v in obj.items() if k != "status"}, "metadata": metadata}


async def test_a_model_named_like_somebody_elses_service_leaves_it_alone(world: World) -> None:
    before = foreign(world, SERVICES, "postgres", spec={"selector": {"app": "postgres"}})
    world.apply(manifests.model("postgres"))
    await world.start()
    await world.ready(IMAGE_MODELS, "postgres")
    assert world.get(SERVICES, "postgres") == before
    assert world.get(SERVICES, "model-postgres")["spec"]["selector"] != before["spec"]["selector"]


@pytest.mark.parametrize(
    ("resource", "suffix", "spec"),
    [
        (SERVICES, "", {}),
        (DEPLOYMENTS, "", {}),
        (CONFIG_MAPS, "-app", {}),
        (CLAIMS, "-cache", {"source": HUB, "cache": CACHE}),
        (RAY_SERVICES, "", {"runtime": "RayService"}),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
async def test_what_a_model_needs_and_somebody_else_has_is_refused_until_it_is_gone(
    world: World, resource: Resource, suffix: str, spec: Manifest
) -> None:
    name = workload_name("shapes") + suffix
    before = foreign(world, resource, name, spec={"replicas": 1}, data={"theirs": "1"})
    world.apply(manifests.model(**spec))
    await world.start()
    condition = await world.condition(IMAGE_MODELS, "shapes", "Accepted", "False", "ObjectNotOurs")
    assert f"{resource.kind} {name}" in condition["message"]
    await world.quiet()
    assert written(world.get(resource, name)) == written(before)
    models = world.gateway().get("models", [])
    assert all("url" not in entry for entry in models), "the gateway would tell them its token"
    world.delete(resource, name)
    await world.ready(IMAGE_MODELS, "shapes")
    await world.until(lambda: world.gateway()["models"][0].get("url"), "the gateway knows it")


async def test_an_object_of_a_deleted_model_of_the_name_is_not_taken_up(world: World) -> None:
    owner = {"kind": "ImageModel", "name": "shapes", "uid": "00000000-of-another-life"}
    made = foreign(world, DEPLOYMENTS, "other", spec={"replicas": 1})
    made["metadata"] |= {"name": "model-shapes", "ownerReferences": [owner]}
    world.server.objects.all(DEPLOYMENTS)["calotype", "model-shapes"] = made
    world.apply(manifests.model())
    await world.start()
    await world.condition(IMAGE_MODELS, "shapes", "Accepted", "False", "ObjectNotOurs")


async def test_a_training_does_not_take_a_job_of_others_for_its_own(world: World) -> None:
    before = foreign(world, RAY_JOBS, "train-sneaker", spec={"suspend": True, "entrypoint": "x"})
    world.apply(manifests.model())
    world.apply(TRAINING)
    await world.start()
    await world.condition(LORA_TRAININGS, "sneaker", "Accepted", "False", "ObjectNotOurs")
    await world.quiet()
    assert world.get(RAY_JOBS, "train-sneaker")["spec"] == before["spec"]


async def test_a_ray_cluster_with_forged_labels_is_not_resized(world: World) -> None:
    labels = {
        "ray.io/originated-from-cr-name": workload_name("shapes"),
        "ray.io/originated-from-crd": "RayService",
    }
    groups = [{"groupName": "generator", "minReplicas": 0, "maxReplicas": 0, "replicas": 0}]
    forged = {"metadata": {"name": "theirs", "namespace": "calotype", "labels": labels}}
    world.server.objects.create(RAY_CLUSTERS, {**forged, "spec": {"workerGroupSpecs": groups}})
    world.apply(manifests.model(runtime="RayService", replicas={"min": 2, "max": 3}))
    await world.start()
    await world.ready(IMAGE_MODELS, "shapes")
    await world.quiet()
    assert world.get(RAY_CLUSTERS, "theirs")["spec"]["workerGroupSpecs"] == groups


async def test_jobs_of_others_are_not_taken_for_orphans(world: World) -> None:
    labels = {
        "app.kubernetes.io/component": "fetch",
        "calotype.dev/adapter": "gone",
        "calotype.dev/adapter-namespace": "calotype",
    }
    world.server.objects.create(
        JOBS, {"metadata": {"name": "theirs", "namespace": "calotype", "labels": labels}}
    )
    await world.start()
    await world.go_on(60)
    assert world.find(JOBS, "theirs") is not None


@pytest.mark.parametrize(
    ("resource", "suffix", "edit"),
    [
        (SERVICES, "", {"spec": {"selector": {"calotype.dev/model": "theirs"}}}),
        (CONFIG_MAPS, "-app", {"data": {"model.json": "{}"}}),
    ],
    ids=["Service", "ConfigMap"],
)
async def test_a_field_of_ours_that_somebody_edits_is_taken_back(
    world: World, resource: Resource, suffix: str, edit: Manifest
) -> None:
    world.apply(manifests.model())
    await world.start(resyncSeconds=5)
    await world.ready(IMAGE_MODELS, "shapes")
    name = workload_name("shapes") + suffix
    field = next(iter(edit))
    wanted = copy.deepcopy(world.get(resource, name)[field])
    world.server.objects.merge(resource, "calotype", name, edit)
    is_back: Callable[[], bool] = lambda: world.get(resource, name)[field] == wanted  # noqa: E731
    await world.until(lambda: not is_back(), "it was edited")
    await world.until(is_back, "it is as the model wants it")


async def test_the_gateways_configuration_of_somebody_else_is_left_alone(world: World) -> None:
    foreign(world, CONFIG_MAPS, "calotype-gateway-config", data={"gateway.json": "theirs"})
    world.apply(manifests.model())
    await world.start()
    await world.ready(IMAGE_MODELS, "shapes")
    await world.quiet(5)
    found = world.get(CONFIG_MAPS, "calotype-gateway-config")
    assert found["data"] == {"gateway.json": "theirs"}


async def test_files_of_a_fetch_are_not_written_into_objects_of_others(world: World) -> None:
    world.cluster.hold_jobs = True
    world.apply(manifests.model(source=HUB))
    await world.start()
    job = await world.until(lambda: next(iter(world.server.objects.all(JOBS)), None), "a Job")
    await world.kill()
    world.delete(CONFIG_MAPS, job[1])
    before = foreign(world, CONFIG_MAPS, job[1], data={"theirs": "1"})
    await world.start()
    await world.condition(IMAGE_MODELS, "shapes", "Accepted", "False", "ObjectNotOurs")
    assert world.get(CONFIG_MAPS, job[1]) == before
    assert world.find(LORA_ADAPTERS, "shapes") is None


# --- names of an earlier release -----------------------------------------------------------------


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

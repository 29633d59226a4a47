"""A LoRATraining becomes a RayJob, and at its end a LoRAAdapter."""

from __future__ import annotations

import json
from typing import Any

from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    IMAGE_MODELS,
    LORA_ADAPTERS,
    LORA_TRAININGS,
    RAY_JOBS,
)

from . import manifests
from .virtual import World


def training(name: str = "sneaker", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "LoRATraining",
        "metadata": {"name": name, "namespace": "calotype"},
        "spec": {
            "modelRef": {"name": "shapes"},
            "dataset": {"persistentVolumeClaim": {"claimName": "photos", "path": "sneaker"}},
            "caption": {"triggerWord": "acme sneaker"},
            "steps": 200,
            "resourceProfile": "a100",
            **spec,
        },
    }


async def test_a_training_ends_as_an_adapter_that_is_loaded(world: World) -> None:
    world.apply(manifests.model())
    world.apply(training())
    await world.start()
    status = (await world.ready(LORA_TRAININGS, "sneaker"))["status"]
    assert status["phase"] == "Succeeded"
    assert status["adapterRef"] == {"name": "sneaker", "namespace": "calotype"}
    adapter = await world.ready(LORA_ADAPTERS, "sneaker")
    assert adapter["spec"]["triggerWords"] == ["acme sneaker"]
    path = adapter["spec"]["source"]["path"]
    assert adapter["spec"]["source"]["path"].endswith(
        "/trainings/calotype/sneaker/adapter.safetensors"
    )
    job = world.find(RAY_JOBS, "train-sneaker")
    assert job["spec"]["entrypoint"].startswith("calotype train lora --config ")
    config = json.loads(world.find(CONFIG_MAPS, "train-sneaker")["data"]["training.json"])
    assert config["spec"]["steps"] == 200
    assert path.startswith(config["outputDir"])


async def test_what_became_of_the_adapter_afterwards_is_its_owners_business(world: World) -> None:
    """Neither is a deleted adapter made again, nor a changed one changed back."""
    world.apply(manifests.model())
    world.apply(training())
    await world.start(resyncSeconds=1)
    await world.ready(LORA_ADAPTERS, "sneaker")
    patch = {"spec": {"triggerWords": ["other"]}}
    world.server.objects.merge(LORA_ADAPTERS, "calotype", "sneaker", patch)
    world.apply(training(adapterTemplate={"spec": {"preload": "Always"}}))
    await world.quiet()
    assert world.find(LORA_ADAPTERS, "sneaker")["spec"]["triggerWords"] == ["other"]
    world.delete(LORA_ADAPTERS, "sneaker")
    await world.gone(LORA_ADAPTERS, "sneaker")
    await world.kill()
    await world.start()
    await world.quiet()
    assert world.find(LORA_ADAPTERS, "sneaker") is None


async def test_a_training_that_fails_says_why(world: World) -> None:
    world.cluster.training = lambda name: "FAILED"
    world.apply(manifests.model())
    world.apply(training())
    await world.start()
    condition = await world.condition(LORA_TRAININGS, "sneaker", "Succeeded", "False", "JobFailed")
    assert "NaN" in condition["message"]
    status = world.find(LORA_TRAININGS, "sneaker")["status"]
    assert status["phase"] == "Failed"
    assert "NaN" in status["lastFailure"]["message"]
    assert world.find(LORA_ADAPTERS, "sneaker") is None


async def test_a_training_waits_for_its_model_and_for_kuberay(world: World) -> None:
    ray = {r for r in world.server.resources if r.group == "ray.io"}
    world.server.resources -= ray
    world.apply(training())
    await world.start()
    await world.condition(LORA_TRAININGS, "sneaker", "Accepted", "False", "ModelMissing")
    world.apply(manifests.model())
    await world.condition(LORA_TRAININGS, "sneaker", "Accepted", "False", "KubeRayNotInstalled")
    world.server.resources |= ray
    await world.ready(LORA_TRAININGS, "sneaker")


async def test_a_training_can_be_suspended(world: World) -> None:
    world.cluster.training = lambda name: "RUNNING"
    world.apply(manifests.model())
    world.apply(training())
    await world.start()
    await world.condition(LORA_TRAININGS, "sneaker", "Running")
    world.apply(training(suspend=True))
    await world.condition(LORA_TRAININGS, "sneaker", "Running", "False", "Suspended")
    assert world.find(RAY_JOBS, "train-sneaker")["spec"]["suspend"] is True
    world.cluster.training = lambda name: "SUCCEEDED"
    world.apply(training(suspend=False))
    await world.ready(LORA_TRAININGS, "sneaker")


async def test_an_adapter_of_that_name_that_is_somebody_elses(world: World) -> None:
    world.apply(manifests.model())
    world.apply(manifests.adapter("sneaker"))
    world.apply(training())
    await world.start()
    await world.condition(LORA_TRAININGS, "sneaker", "Ready", "False", "NameConflict")
    assert "builtIn" in world.find(LORA_ADAPTERS, "sneaker")["spec"]["source"]
    world.delete(LORA_ADAPTERS, "sneaker")
    await world.ready(LORA_TRAININGS, "sneaker")
    assert world.find(IMAGE_MODELS, "shapes")["status"]["phase"] == "Ready"


async def test_a_deleted_training_takes_its_job_and_leaves_its_adapter(world: World) -> None:
    world.apply(manifests.model())
    world.apply(training())
    await world.start()
    await world.ready(LORA_ADAPTERS, "sneaker")
    world.delete(LORA_TRAININGS, "sneaker")
    await world.gone(RAY_JOBS, "train-sneaker")
    await world.quiet()
    assert world.find(LORA_ADAPTERS, "sneaker") is not None

"""What peers get wrong about everything around adapters; the numbers are those of the design page.

7 deleting, 8 conflicts, 9 bursts and capacity; 10 and 11: test_imagemodel.py, 12: test_faults.py.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    IMAGE_MODELS,
    JOBS,
    LORA_ADAPTERS,
    NAMESPACES,
    SERVICES,
)

from . import manifests
from .virtual import World


def names_pushed(world: World) -> set[str]:
    found = world.find(CONFIG_MAPS, "model-shapes-app")
    config = json.loads(found["data"]["model.json"])
    generator = next(d for d in config["deployments"] if d["name"] == "Generator")
    return {a["metadata"]["name"] for a in generator["user_config"]["adapters"]}


def names_at_the_gateway(world: World) -> set[str]:
    found = world.find(CONFIG_MAPS, "calotype-gateway-config")
    document = json.loads(found["data"]["gateway.json"]) if found else {"adapters": []}
    return {a["metadata"]["name"] for a in document["adapters"]}


async def with_adapter(world: World, **settings: Any) -> None:
    world.apply(manifests.model())
    world.apply(manifests.adapter())
    await world.start(**settings)
    await world.ready(LORA_ADAPTERS, "stripes")
    await world.until(lambda: "stripes" in names_at_the_gateway(world), "the gateway knows it")


async def test_point_7_deleting_tells_the_gateway_then_the_replicas_then_lets_go(
    world: World,
) -> None:
    await with_adapter(world, drainSeconds=0.5)
    order: list[str] = []

    def watch(change: Any) -> None:
        name = change.obj["metadata"]["name"]
        if name == "calotype-gateway-config" and not names_at_the_gateway(world):
            order.append("gateway")
        if name == "model-shapes-app" and not names_pushed(world):
            order.append("replicas")
        if name == "stripes" and change.type == "DELETED":
            order.append("gone")

    world.server.objects.listeners.append(watch)
    world.delete(LORA_ADAPTERS, "stripes")
    await world.gone(LORA_ADAPTERS, "stripes")
    assert order == ["gateway", "replicas", "gone"]


async def test_point_7_a_replica_that_holds_on_delays_until_the_deadline_only(world: World) -> None:
    await with_adapter(world)
    world.cluster.apps.app("calotype", "shapes").keeps = True
    world.annotate(LORA_ADAPTERS, "stripes", delete_deadline_seconds="2")
    world.delete(LORA_ADAPTERS, "stripes")
    await world.condition(LORA_ADAPTERS, "stripes", "Ready", "False", "Deleting")
    await world.gone(LORA_ADAPTERS, "stripes")


async def test_point_7_the_annotation_lets_go_at_once(world: World) -> None:
    await with_adapter(world, deleteDeadlineSeconds=3600)
    world.cluster.apps.app("calotype", "shapes").keeps = True
    world.delete(LORA_ADAPTERS, "stripes")
    await world.condition(LORA_ADAPTERS, "stripes", "Ready", "False", "Deleting")
    world.annotate(LORA_ADAPTERS, "stripes", force_delete="true")
    await world.gone(LORA_ADAPTERS, "stripes")


async def test_point_7_deleting_does_not_wait_for_a_model_that_is_gone(world: World) -> None:
    await with_adapter(world, deleteDeadlineSeconds=3600)
    world.delete(IMAGE_MODELS, "shapes")
    await world.gone(IMAGE_MODELS, "shapes")
    await world.condition(LORA_ADAPTERS, "stripes", "Ready", "False", "ModelMissing")
    world.delete(LORA_ADAPTERS, "stripes")
    await world.gone(LORA_ADAPTERS, "stripes")
    for resource in (DEPLOYMENTS, SERVICES, JOBS):
        assert not world.server.objects.all(resource), f"orphans of {resource.kind}"


async def test_point_7_deleting_does_not_wait_for_a_model_that_nobody_reaches(world: World) -> None:
    await with_adapter(world, deleteDeadlineSeconds=3600)
    world.cluster.apps.silent = True
    await world.condition(IMAGE_MODELS, "shapes", "Serving", "False")
    world.delete(LORA_ADAPTERS, "stripes")
    await world.gone(LORA_ADAPTERS, "stripes")
    world.delete(IMAGE_MODELS, "shapes")
    await world.gone(IMAGE_MODELS, "shapes")


async def test_point_7_deleting_does_not_wait_for_a_model_that_is_refused(world: World) -> None:
    """Its replicas are told nothing until it is accepted again."""
    await with_adapter(world, deleteDeadlineSeconds=3600)
    lost = {"moderationPolicyRef": {"name": "lost"}}
    world.apply(manifests.model(**lost))
    await world.condition(IMAGE_MODELS, "shapes", "Accepted", "False", "PolicyMissing")
    world.delete(LORA_ADAPTERS, "stripes")
    await world.gone(LORA_ADAPTERS, "stripes")
    assert names_pushed(world) == {"stripes"}
    await world.until(lambda: names_at_the_gateway(world) == set(), "the gateway forgets it")
    world.apply(manifests.model())
    await world.ready(IMAGE_MODELS, "shapes")
    await world.until(lambda: names_pushed(world) == set(), "the replicas forget it")


async def test_point_7_a_model_with_work_ends_it_first(world: World) -> None:
    await with_adapter(world, deleteDeadlineSeconds=3600)
    app = world.cluster.apps.app("calotype", "shapes")
    app.queue_seconds = 40
    await world.until(
        lambda: world.find(IMAGE_MODELS, "shapes")["status"].get("queueSeconds") == 40, "busy"
    )
    world.delete(IMAGE_MODELS, "shapes")
    await world.condition(IMAGE_MODELS, "shapes", "Ready", "False", "Deleting")
    await world.quiet()
    assert world.find(DEPLOYMENTS, "model-shapes") is not None
    app.queue_seconds = 0
    await world.gone(IMAGE_MODELS, "shapes")
    assert world.find(DEPLOYMENTS, "model-shapes") is None


async def test_point_7_a_namespace_that_ends_takes_everything_along(world: World) -> None:
    world.cluster.namespace("shoes")
    world.apply(manifests.model(adapters={"namespaces": {"from": "All"}}))
    sneaker = manifests.of_hub(modelRef={"name": "shapes", "namespace": "calotype"})
    sneaker["metadata"]["namespace"] = "shoes"
    world.apply(sneaker)
    await world.start(deleteDeadlineSeconds=3600)
    await world.ready(LORA_ADAPTERS, "sneaker", "shoes")
    world.cluster.apps.app("calotype", "shapes").keeps = True
    world.server.objects.delete(NAMESPACES, "", "shoes")
    await world.until(
        lambda: world.server.objects.find(NAMESPACES, "", "shoes") is None, "the namespace is gone"
    )
    await world.until(lambda: "sneaker" not in names_pushed(world), "the replicas forget it")


async def test_point_8_what_one_object_cannot_say_is_a_condition_that_heals(world: World) -> None:
    world.cluster.namespace("shoes", {"team": "shoes"})
    world.apply(manifests.adapter())
    foreign = manifests.adapter(
        "foreign", "shoes", modelRef={"name": "shapes", "namespace": "calotype"}
    )
    double = manifests.adapter(
        "stripes", "shoes", modelRef={"name": "shapes", "namespace": "calotype"}
    )
    await world.start()
    await world.condition(LORA_ADAPTERS, "stripes", "Accepted", "False", "ModelMissing")
    world.apply(manifests.model())
    await world.ready(LORA_ADAPTERS, "stripes")
    await world.go_on(1.1)  # creation times have whole seconds
    world.apply(foreign)
    world.apply(double)
    await world.condition(
        LORA_ADAPTERS, "foreign", "Accepted", "False", "NamespaceNotAllowed", "shoes"
    )
    selector = {"matchLabels": {"team": "shoes"}}
    world.apply(
        manifests.model(adapters={"namespaces": {"from": "Selector", "selector": selector}})
    )
    await world.ready(LORA_ADAPTERS, "foreign", "shoes")
    await world.condition(LORA_ADAPTERS, "stripes", "Accepted", "False", "NameConflict", "shoes")
    world.delete(LORA_ADAPTERS, "stripes")
    await world.ready(LORA_ADAPTERS, "stripes", "shoes")


async def test_point_9_fifty_adapters_at_once_are_one_push(world: World) -> None:
    world.apply(manifests.model())
    await world.start(debounceSeconds=1.0)
    await world.ready(IMAGE_MODELS, "shapes")
    pushes = world.cluster.apps.app("calotype", "shapes").pushes
    before = len(pushes)
    for number in range(50):
        world.apply(manifests.adapter(f"a{number:02}"))
    await asyncio.gather(*(world.ready(LORA_ADAPTERS, f"a{number:02}") for number in range(50)))
    assert [len(names) for names in pushes[before:]] == [50]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"maxAdaptersPerModel": 3}, "3 adapters"),
        ({"maxConfigBytes": 1800}, "bytes"),
    ],
)
async def test_point_9_what_does_not_fit_waits_for_room(
    world: World, settings: dict[str, Any], expected: str
) -> None:
    world.apply(manifests.model())
    await world.start(**settings)
    for name in ("a", "b", "c", "d"):
        world.apply(manifests.adapter(name))
    # Objects of one second are in the order of their names.
    await world.ready(LORA_ADAPTERS, "c")
    condition = await world.condition(LORA_ADAPTERS, "d", "Accepted", "False", "CapacityExceeded")
    assert expected in condition["message"]
    assert names_pushed(world) == {"a", "b", "c"}
    world.delete(LORA_ADAPTERS, "b")
    await world.ready(LORA_ADAPTERS, "d")
    assert names_pushed(world) == {"a", "c", "d"}

"""Point 12 of the design page: whatever the API server does, nothing is lost and nothing twice."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from calotype.operator.kube.client import HttpKubeClient
from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    IMAGE_MODELS,
    JOBS,
    LEASES,
    LORA_ADAPTERS,
    PODS,
    SECRETS,
    TEAMS,
)
from calotype.operator.runtime.lease import Lease
from calotype.operator.runtime.workqueue import Key

NAMES = [f"sneaker-{number}" for number in range(6)]


def everything(world: Any, manifests: Any) -> None:
    """A model, adapters that have to be fetched, and a team."""
    world.apply(manifests.model())
    for name in NAMES:
        world.apply(manifests.of_hub(name, repo=f"acme/{name}"))
    world.apply(
        {
            "apiVersion": "calotype.dev/v1alpha1",
            "kind": "Team",
            "metadata": {"name": "shoes", "namespace": "calotype"},
            "spec": {},
        }
    )


async def all_ready(world: Any) -> None:
    await world.ready(IMAGE_MODELS, "shapes")
    await world.ready(TEAMS, "shoes")
    for name in NAMES:
        await world.ready(LORA_ADAPTERS, name)


def nothing_twice(world: Any) -> None:
    """Each adapter was fetched once, each child made once, and nothing is left over."""
    created = Counter(
        (change.resource.kind, change.obj["metadata"]["name"])
        for change in world.server.objects.changes
        if change.type == "ADDED" and change.resource in (DEPLOYMENTS, SECRETS, CONFIG_MAPS)
    )
    assert {name: count for name, count in created.items() if count > 1} == {}
    fetched = Counter(name.rsplit("-", 1)[0] for name in world.cluster.started_jobs)
    assert fetched == {f"fetch-{name}": 1 for name in NAMES}
    assert not world.server.objects.all(JOBS)
    assert not world.server.objects.all(PODS)


FAULTS: dict[str, list[dict[str, Any]]] = {
    "conflicts": [
        {"method": "PATCH", "path": "loraadapters/[^/]*[?]", "status": 409, "times": 5},
        {"method": "PATCH", "path": "imagemodels/", "status": 409, "times": 3},
    ],
    "too many requests": [
        {"method": "PATCH", "path": "/status", "status": 429, "times": 8, "retry_after": 1},
        {"method": "GET", "path": "jobs", "status": 429, "times": 4},
        {"method": "GET", "path": "watch=true", "status": 429, "times": 3},
    ],
    "server errors": [
        {"method": "POST", "path": "jobs", "status": 500, "times": 3},
        {"method": "PATCH", "path": "configmaps", "status": 500, "times": 3},
        {"method": "GET", "path": "loraadapters", "status": 503, "times": 6},
    ],
    "broken connections": [
        {"method": "POST", "path": "jobs", "times": 2},
        {"method": "PATCH", "path": "", "times": 6},
        {"method": "GET", "path": "", "times": 6},
    ],
    "lost answers": [
        {"method": "POST", "path": "jobs", "times": 4, "after": True},
        {"method": "POST", "path": "secrets", "times": 1, "after": True},
        {"method": "PATCH", "path": "/status", "times": 6, "after": True},
        {"method": "PATCH", "path": "deployments", "times": 1, "after": True},
        {"method": "DELETE", "path": "jobs", "times": 3, "after": True},
    ],
    "slow": [
        {"method": "POST", "path": "jobs", "times": 4, "delay": 0.7},
        {"method": "PATCH", "path": "/status", "times": 6, "delay": 0.5},
    ],
}


@pytest.mark.parametrize("kind", FAULTS)
async def test_point_12_faults_delay_and_change_nothing(
    world: Any, manifests: Any, kind: str
) -> None:
    everything(world, manifests)
    for fault in FAULTS[kind]:
        world.server.fail(**fault)
    await world.start()
    await all_ready(world)
    await world.quiet()
    nothing_twice(world)
    assert all(fault.times <= 0 for fault in world.server.faults), "every fault happened"


async def test_point_12_watches_that_drop_and_histories_that_are_forgotten_lose_nothing(
    world: Any, manifests: Any
) -> None:
    everything(world, manifests)
    await world.start()
    for round_ in range(4):
        await asyncio.sleep(0.4)
        world.server.drop_watches()
        world.apply(manifests.adapter(f"late-{round_}"))
        if round_ % 2:
            world.server.objects.forget_history()
    await all_ready(world)
    for round_ in range(4):
        await world.ready(LORA_ADAPTERS, f"late-{round_}")


async def test_point_12_what_was_deleted_unseen_is_forgotten(world: Any, manifests: Any) -> None:
    """No watch tells of it: the finalizer was taken off by somebody else, and the event lost."""
    world.apply(manifests.model())
    world.apply(manifests.adapter())
    operator = await world.start(resyncSeconds=0.5)
    await world.ready(LORA_ADAPTERS, "stripes")
    world.server.objects.listeners.clear()  # nobody hears of what follows
    world.server.objects.all(LORA_ADAPTERS).clear()
    world.server.objects.listeners.append(world.server._spread)
    operator.queue.add(Key("Resync", "", ""))

    def forgotten() -> bool:
        config = json.loads(world.find(CONFIG_MAPS, "shapes-app")["data"]["model.json"])
        generator = next(d for d in config["deployments"] if d["name"] == "Generator")
        return generator["user_config"]["adapters"] == []

    await world.until(forgotten, "the replicas are told to forget it")


async def test_point_12_an_api_server_that_goes_and_comes(world: Any, manifests: Any) -> None:
    everything(world, manifests)
    await world.start()
    await world.ready(IMAGE_MODELS, "shapes")
    await world.server.__aexit__()
    await asyncio.sleep(1.5)
    restarted = type(world.server)(world.server.resources)
    restarted.objects, restarted.port = world.server.objects, world.server.port
    restarted.objects.listeners.remove(world.server._spread)
    restarted.objects.listeners.append(restarted._spread)
    from calotype.operator.testing.modelapps import FakeModelApps

    apps = world.cluster.apps.apps
    world.cluster.apps = FakeModelApps(restarted)
    world.cluster.apps.apps = apps
    async with restarted:
        world.server = world.cluster.server = restarted
        await all_ready(world)
        await world.quiet()
        nothing_twice(world)
        await world.kill()


async def test_point_12_an_operator_that_is_stopped_and_started_does_nothing_twice(
    world: Any, manifests: Any
) -> None:
    everything(world, manifests)
    world.server.fail("PATCH", "/status", times=20, delay=0.1)
    for seconds in (0.2, 0.3, 0.4, 0.5):
        await world.start()
        await asyncio.sleep(seconds)
        await world.kill()
    await world.start()
    await all_ready(world)
    await world.quiet()
    nothing_twice(world)
    version = world.server.objects.version
    await world.stop()
    await world.start()
    await all_ready(world)
    await world.quiet()
    assert world.server.objects.version == version, "a restart alone writes nothing"


async def test_a_namespace_that_is_forbidden_does_not_stop_the_others(
    world: Any, manifests: Any
) -> None:
    world.cluster.namespace("shoes")
    world.server.forbidden.add("shoes")
    world.apply(manifests.model())
    operator = await world.start(namespaces=["calotype", "shoes"])
    await world.ready(IMAGE_MODELS, "shapes")
    assert operator.watcher.scope is not None
    assert operator.watcher.scope.namespaces == ("calotype",)


async def test_a_namespace_that_loses_its_rights_meanwhile_does_not_either(
    world: Any, manifests: Any
) -> None:
    world.cluster.namespace("shoes")
    operator = await world.start(namespaces=["calotype", "shoes"])
    world.server.forbidden.add("shoes")
    world.server.drop_watches()
    await world.until(
        lambda: operator.watcher.scope and operator.watcher.scope.namespaces == ("calotype",),
        "the others are watched on",
        30,
    )
    world.apply(manifests.model())
    await world.ready(IMAGE_MODELS, "shapes")


async def test_two_operators_never_act_at_once(world: Any) -> None:
    async with HttpKubeClient() as kube:
        first = Lease(kube, world.settings(), "pod-1")
        second = Lease(kube, world.settings(), "pod-2")
        await first.acquire()
        waiting = asyncio.create_task(second.acquire())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 2.5)
        await Lease(kube, world.settings(), "pod-1").acquire()  # the same pod, started again
        await first.give_up()
        await asyncio.wait_for(waiting, 5)
        holder = world.find(LEASES, "calotype-operator")["spec"]["holderIdentity"]
        assert holder == "pod-2"

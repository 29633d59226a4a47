"""What users and clusters get wrong: a typed condition, no crash loop, and healed by itself."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from calotype.operator.kube.resources import (
    CLAIMS,
    CONFIG_MAPS,
    IMAGE_MODELS,
    LORA_ADAPTERS,
    MODERATION_POLICIES,
    TEAMS,
)
from calotype.operator.runtime.workqueue import Key
from calotype.operator.testing.cluster import good_fetch

from . import manifests
from .virtual import World

HUB = {"huggingFace": {"repo": "acme/flux", "revision": "main"}}


def policy(name: str, block: float) -> dict[str, Any]:
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "ModerationPolicy",
        "metadata": {"name": name, "namespace": "calotype"},
        "spec": {"version": 1, "categories": {"sexual": {"text": {"block": block}}}},
    }


async def test_a_circle_of_fallbacks(world: World) -> None:
    def falls_back(to: str) -> dict[str, Any]:
        return {"fallback": {"modelRef": {"name": to}}}

    await world.start()
    world.apply(manifests.model("a", **falls_back("b")))
    await world.condition(IMAGE_MODELS, "a", "Accepted", "False", "FallbackMissing")
    world.apply(manifests.model("b", **falls_back("c")))
    world.apply(manifests.model("c", **falls_back("a")))
    for name in ("a", "b", "c"):
        condition = await world.condition(IMAGE_MODELS, name, "Accepted", "False", "ReferenceCycle")
        assert "->" in condition["message"]
    world.apply(manifests.model("c"))
    for name in ("a", "b", "c"):
        await world.ready(IMAGE_MODELS, name)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"resourceProfile": "a100-8gb"}, "ProfileUnknown"),
        ({"aliases": ["taken"]}, "NameConflict"),
        ({"replicas": {"min": "many"}}, "InvalidSpec"),
    ],
)
async def test_a_model_that_cannot_be_served_says_why(
    world: World, spec: dict[str, Any], reason: str
) -> None:
    world.apply(manifests.model("first", aliases=["taken"]))
    await world.start()
    await world.ready(IMAGE_MODELS, "first")
    world.apply(manifests.model("wrong", **spec))
    await world.condition(IMAGE_MODELS, "wrong", "Accepted", "False", reason)
    await world.condition(IMAGE_MODELS, "wrong", "Ready", "False", reason)
    world.apply(manifests.model("wrong", source={"path": "/models/flux"}))
    world.server.objects.merge(
        IMAGE_MODELS,
        "calotype",
        "wrong",
        {"spec": {"source": {"builtIn": None}}},
    )
    await world.ready(IMAGE_MODELS, "wrong")


async def test_an_adapter_larger_than_the_budget(world: World) -> None:
    """Refused by the Job before it is loaded, and later by a budget that was made smaller."""

    def sized(config: dict[str, Any]) -> dict[str, Any]:
        if config["maxBytes"] < 50_000:
            return {"ok": False, "reason": "TooLarge", "message": "It has 123,456 bytes."}
        return good_fetch(config)

    world.cluster.fetch = sized
    world.apply(manifests.model(adapters={"memoryBudget": "40k"}))
    world.apply(manifests.of_hub())
    await world.start()
    await world.condition(LORA_ADAPTERS, "sneaker", "Checked", "False", "TooLarge")
    world.apply(manifests.model(adapters={"memoryBudget": "1M"}))
    await world.ready(LORA_ADAPTERS, "sneaker")
    world.apply(manifests.model(adapters={"memoryBudget": "100k"}))
    await world.condition(LORA_ADAPTERS, "sneaker", "Accepted", "False", "TooLarge")
    world.apply(manifests.model(adapters={"memoryBudget": "1M", "maxRank": 4}))
    await world.condition(LORA_ADAPTERS, "sneaker", "Accepted", "False", "RankTooHigh")
    world.apply(manifests.model(adapters={"memoryBudget": "1M", "maxRank": 64}))
    await world.ready(LORA_ADAPTERS, "sneaker")
    assert len(world.cluster.started_jobs) == 2


async def test_a_volume_that_is_never_bound(world: World) -> None:
    world.cluster.unbindable.add("slow")
    world.cluster.hold_jobs = True
    cache = {"persistentVolumeClaim": {"size": "10Gi", "storageClassName": "slow"}}
    world.apply(manifests.model(source=HUB, cache=cache))
    await world.start(bindSeconds=1)
    condition = await world.condition(
        IMAGE_MODELS, "shapes", "WeightsCached", "False", "VolumeNotBound"
    )
    assert "slow" in condition["message"]
    assert "model-shapes-cache" in condition["message"]
    claim = world.find(CLAIMS, "model-shapes-cache")
    world.server.objects.replace(CLAIMS, {**claim, "status": {"phase": "Bound"}})
    world.cluster.resume_jobs()
    await world.ready(IMAGE_MODELS, "shapes")


async def test_a_volume_that_nobody_made(world: World) -> None:
    source = {"persistentVolumeClaim": {"claimName": "loras", "path": "sneaker.safetensors"}}
    world.apply(manifests.model())
    world.apply(manifests.adapter("sneaker", source=source))
    await world.start()
    condition = await world.condition(LORA_ADAPTERS, "sneaker", "Fetched", "False", "VolumeMissing")
    assert "loras" in condition["message"]
    world.server.objects.create(
        CLAIMS, {"metadata": {"name": "loras", "namespace": "calotype"}, "spec": {}}
    )
    await world.ready(LORA_ADAPTERS, "sneaker")


async def test_nowhere_to_keep_what_is_fetched(world: World) -> None:
    world.apply(manifests.model(source=HUB))
    await world.start(dataClaim=None)
    condition = await world.condition(
        IMAGE_MODELS, "shapes", "WeightsCached", "False", "VolumeMissing"
    )
    assert "spec.cache" in condition["message"]
    world.apply(manifests.model(source=HUB, cache={"persistentVolumeClaim": {}}))
    await world.ready(IMAGE_MODELS, "shapes")


async def test_a_job_that_is_killed_for_memory_is_tried_again_later(world: World) -> None:
    world.cluster.fetch = lambda config: "OOMKilled"
    world.apply(manifests.model())
    world.apply(manifests.of_hub())
    await world.start(retrySeconds=2)
    condition = await world.condition(
        LORA_ADAPTERS, "sneaker", "Fetched", "False", "FetchOutOfMemory"
    )
    assert "fetchResources" in condition["message"]
    failure = world.find(LORA_ADAPTERS, "sneaker")["status"]["lastFailure"]
    assert failure["attempts"] == 1
    assert failure["nextRetryTime"] > failure["time"]
    world.cluster.fetch = good_fetch
    await world.ready(LORA_ADAPTERS, "sneaker")
    assert len(world.cluster.started_jobs) == 2


async def test_retries_become_rarer_and_survive_a_restart(world: World) -> None:
    failing = {"ok": False, "reason": "NetworkFailed", "message": "no route"}
    world.cluster.fetch = lambda config: failing
    world.apply(manifests.model())
    world.apply(manifests.of_hub())
    await world.start(retrySeconds=1)

    def attempts(count: int) -> Any:
        status = world.find(LORA_ADAPTERS, "sneaker").get("status", {})
        return status.get("lastFailure", {}).get("attempts", 0) >= count

    await world.until(lambda: attempts(2), "two attempts")
    await world.kill()
    await world.start()
    await world.until(lambda: attempts(3), "and a third")
    assert len(world.cluster.started_jobs) == 3
    failure = world.find(LORA_ADAPTERS, "sneaker")["status"]["lastFailure"]
    pause = datetime.datetime.fromisoformat(failure["nextRetryTime"])
    pause -= datetime.datetime.fromisoformat(failure["time"])
    assert pause.total_seconds() >= 3


@pytest.mark.parametrize("hours", [-30, 30])
async def test_clocks_that_differ(world: World, hours: int) -> None:
    """Deadlines and pauses are measured by the API server's clock, whatever ours says."""
    world.clock.skew = datetime.timedelta(hours=hours)
    world.cluster.fetch = lambda config: "OOMKilled"
    world.apply(manifests.model())
    world.apply(manifests.adapter())
    world.apply(manifests.of_hub())
    await world.start(deleteDeadlineSeconds=3)
    await world.ready(LORA_ADAPTERS, "stripes")
    await world.condition(LORA_ADAPTERS, "sneaker", "Fetched", "False", "FetchOutOfMemory")
    world.cluster.fetch = good_fetch
    await world.ready(LORA_ADAPTERS, "sneaker")
    world.cluster.apps.app("calotype", "shapes").keeps = True
    world.delete(LORA_ADAPTERS, "stripes")
    await world.condition(LORA_ADAPTERS, "stripes", "Ready", "False", "Deleting")
    await world.gone(LORA_ADAPTERS, "stripes")


async def test_finalizers_of_an_older_version(world: World) -> None:
    old = ["calotype.dev/cleanup", "other.example/keep"]
    for manifest in (manifests.model(), manifests.adapter()):
        manifest["metadata"]["finalizers"] = old
        world.apply(manifest)
    team = {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "Team",
        "metadata": {
            "name": "shoes",
            "namespace": "calotype",
            "finalizers": ["calotype.dev/cleanup"],
        },
        "spec": {},
    }
    world.apply(team)
    await world.start()
    found = await world.ready(LORA_ADAPTERS, "stripes")
    assert found["metadata"]["finalizers"] == ["other.example/keep", "calotype.dev/operator"]
    world.delete(TEAMS, "shoes")
    await world.gone(TEAMS, "shoes")
    world.delete(LORA_ADAPTERS, "stripes")

    def ours_are_off() -> bool:
        obj = world.find(LORA_ADAPTERS, "stripes")
        return bool(obj["metadata"]["finalizers"] == ["other.example/keep"])

    await world.until(ours_are_off, "only the other one is left")


async def test_a_policy_of_an_adapter_may_only_be_stricter(world: World) -> None:
    world.apply(policy("default", 0.5))
    world.apply(policy("lax", 0.9))
    world.apply(manifests.model())
    world.apply(manifests.adapter(moderationPolicyRef={"name": "lax"}))
    await world.start()
    condition = await world.condition(LORA_ADAPTERS, "stripes", "Accepted", "False", "PolicyLaxer")
    assert "categories.sexual.text.block" in condition["message"]
    world.apply(policy("lax", 0.2))
    await world.ready(LORA_ADAPTERS, "stripes")
    assert world.find(MODERATION_POLICIES, "lax")["status"]["usedBy"] == 1


async def test_a_configuration_that_somebody_wrote_over_is_written_again(world: World) -> None:
    world.apply(manifests.model())
    operator = await world.start(resyncSeconds=1)
    await world.ready(IMAGE_MODELS, "shapes")
    operator.queue.add(Key("Resync", "", ""))
    world.server.objects.merge(
        CONFIG_MAPS, "calotype", "model-shapes-app", {"data": {"model.json": "{}"}}
    )

    def mended() -> bool:
        text = world.find(CONFIG_MAPS, "model-shapes-app")["data"]["model.json"]
        return bool(json.loads(text).get("name") == "shapes")

    await world.until(mended, "it is written again")

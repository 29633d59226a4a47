"""An ImageModel becomes a running service, and its status says so."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
from collections.abc import AsyncIterator
from typing import Any, cast

import certifi
import pytest
from aiohttp import web
from servers.certificates import authority_of, make_certificates

from calotype.operator.kube.client import KubeClient
from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    IMAGE_MODELS,
    LORA_ADAPTERS,
    MODERATION_POLICIES,
    RAY_CLUSTERS,
    RAY_SERVICES,
    SECRETS,
    SERVICES,
    TEAMS,
)
from calotype.operator.runtime.model_app import ModelApps, NoAnswer

from . import manifests
from .pure.parts import settings
from .virtual import World


def gateway(world: World) -> dict[str, Any]:
    found = world.find(CONFIG_MAPS, "calotype-gateway-config")
    return dict(json.loads(found["data"]["gateway.json"])) if found else {}


async def test_a_model_in_one_pod_becomes_ready(world: World) -> None:
    world.apply(manifests.model())
    await world.start()
    found = await world.ready(IMAGE_MODELS, "shapes")
    status = found["status"]
    assert status["phase"] == "Ready"
    assert status["serving"] == "1/1"
    assert status["observedGeneration"] == found["metadata"]["generation"]
    owner = found["metadata"]["uid"]
    for resource, name in (
        (DEPLOYMENTS, "model-shapes"),
        (SERVICES, "model-shapes"),
        (CONFIG_MAPS, "model-shapes-app"),
    ):
        child = world.find(resource, name)
        assert [o["uid"] for o in child["metadata"]["ownerReferences"]] == [owner]
    await world.until(
        lambda: [m["ready"] for m in gateway(world).get("models", [])] == [True], "gateway knows"
    )
    assert gateway(world)["models"][0]["manifest"]["spec"]["source"] == {
        "builtIn": {"name": "shapes"}
    }


async def test_a_quiet_cluster_is_not_written_to(world: World) -> None:
    world.apply(manifests.model())
    world.apply(manifests.adapter())
    await world.start()
    await world.ready(LORA_ADAPTERS, "stripes")
    await world.quiet()
    version = world.server.objects.version
    polls = len(world.server.calls)
    await world.until(lambda: len(world.server.calls) > polls + 20, "it looks again")
    assert world.server.objects.version == version


async def test_weights_are_fetched_once_and_the_pods_are_told_where(world: World) -> None:
    source = {"huggingFace": {"repo": "acme/flux", "revision": "main"}}
    world.apply(manifests.model(source=source, cache={"persistentVolumeClaim": {"size": "10Gi"}}))
    await world.start()
    found = await world.ready(IMAGE_MODELS, "shapes")
    path = found["status"]["weightsPath"]
    assert path.startswith("/var/lib/calotype/cache/models/calotype/shapes/")
    config = json.loads(world.find(CONFIG_MAPS, "model-shapes-app")["data"]["model.json"])
    generator = next(d for d in config["deployments"] if d["name"] == "Generator")
    assert generator["user_config"]["model"]["spec"]["source"] == {"path": path}
    await world.quiet()
    assert len(world.cluster.started_jobs) == 1


@pytest.mark.parametrize("first", [{"min": 1, "max": 2}, {"min": 2, "max": 2}])
async def test_ray_service_and_replica_bounds_reach_the_running_cluster(
    world: World, first: dict[str, int]
) -> None:
    """KubeRay does not hand changed bounds to a running RayCluster."""
    world.apply(manifests.model(runtime="RayService", resourceProfile="a100", replicas=first))
    await world.start()
    await world.ready(IMAGE_MODELS, "shapes")
    world.apply(
        manifests.model(runtime="RayService", resourceProfile="a100", replicas={"min": 3, "max": 8})
    )

    def bounds() -> bool:
        groups = world.find(RAY_CLUSTERS, "model-shapes-abcde")["spec"]["workerGroupSpecs"]
        group = next(g for g in groups if g["groupName"] == "generator")
        return (group["minReplicas"], group["maxReplicas"], group["replicas"]) == (3, 8, 3)

    await world.until(bounds, "bounds reach the RayCluster")
    config = json.loads(world.find(RAY_SERVICES, "model-shapes")["spec"]["serveConfigV2"])
    generator = next(
        d for d in config["applications"][0]["deployments"] if d["name"] == "Generator"
    )
    assert generator["autoscaling_config"]["min_replicas"] == 3
    assert generator["autoscaling_config"]["max_replicas"] == 8
    condition = await world.condition(IMAGE_MODELS, "shapes", "UpgradePlanned", "False")
    assert condition["reason"] == "NoUpgrade"
    for group in world.find(RAY_SERVICES, "model-shapes")["spec"]["rayClusterConfig"][
        "workerGroupSpecs"
    ]:
        # Ray takes whole numbers only, as JSON inside of a shell's quotes.
        resources = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert all(isinstance(amount, int) for amount in resources.values())


async def test_a_second_cluster_is_announced_before_it_is_made(world: World) -> None:
    world.apply(
        manifests.model(runtime="RayService", resourceProfile="a100", replicas={"min": 2, "max": 2})
    )
    await world.start()
    await world.ready(IMAGE_MODELS, "shapes")
    await world.stop()
    started = len(world.server.objects.changes)
    await world.start(serveImage="calotype-serve:next")

    def applied() -> bool:
        cluster = world.find(RAY_SERVICES, "model-shapes")["spec"]["rayClusterConfig"]
        image = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
        return bool(image == "calotype-serve:next")

    await world.until(applied, "the new image is applied")
    order = []
    for change in world.server.objects.changes[started:]:
        if change.resource == IMAGE_MODELS:
            planned = [
                c for c in change.obj["status"]["conditions"] if c["type"] == "UpgradePlanned"
            ]
            if planned and planned[0]["status"] == "True":
                order.append("announced")
                assert "2 nvidia.com/gpu" in planned[0]["message"]
                assert "NewCluster" in planned[0]["message"]
        elif change.resource == RAY_SERVICES and change.type == "MODIFIED":
            text = json.dumps(change.obj["spec"]["rayClusterConfig"])
            if "calotype-serve:next" in text:
                order.append("applied")
    assert order[0] == "announced"


async def test_in_place_only_holds_a_change_back_and_still_pushes_configuration(
    world: World,
) -> None:
    spec = {"runtime": "RayService", "upgradeStrategy": "InPlaceOnly"}
    world.apply(manifests.model(**spec))
    await world.start()
    await world.ready(IMAGE_MODELS, "shapes")
    await world.stop()
    await world.start(serveImage="calotype-serve:next")
    condition = await world.condition(IMAGE_MODELS, "shapes", "UpgradePlanned", reason="HeldBack")
    assert "suspend" in condition["message"]
    world.apply(manifests.adapter())
    await world.ready(LORA_ADAPTERS, "stripes")
    assert "calotype-serve:next" not in json.dumps(world.find(RAY_SERVICES, "model-shapes"))
    world.apply(manifests.model(suspend=True, **spec))
    await world.until(
        lambda: "calotype-serve:next" in json.dumps(world.find(RAY_SERVICES, "model-shapes")),
        "a suspended model takes the change",
    )


async def test_kuberay_may_come_later(world: World) -> None:
    ray = {r for r in world.server.resources if r.group == "ray.io"}
    world.server.resources -= ray
    world.apply(manifests.model(runtime="RayService"))
    await world.start()
    await world.condition(IMAGE_MODELS, "shapes", "KubeRayMissing")
    await world.condition(IMAGE_MODELS, "shapes", "Ready", "False", "KubeRayNotInstalled")
    world.server.resources |= ray
    await world.ready(IMAGE_MODELS, "shapes")
    await world.condition(IMAGE_MODELS, "shapes", "KubeRayMissing", "False")


async def test_suspending_takes_the_pods_and_resuming_brings_them(world: World) -> None:
    world.apply(manifests.model())
    await world.start()
    await world.ready(IMAGE_MODELS, "shapes")
    world.apply(manifests.model(suspend=True))
    await world.condition(IMAGE_MODELS, "shapes", "Ready", "False", "Suspended")
    assert world.find(DEPLOYMENTS, "model-shapes")["spec"]["replicas"] == 0
    assert world.find(IMAGE_MODELS, "shapes")["status"]["phase"] == "Suspended"
    world.apply(manifests.model(suspend=False))
    await world.ready(IMAGE_MODELS, "shapes")


async def test_a_model_without_the_secret_of_tls_says_which_one_to_make(world: World) -> None:
    world.apply(manifests.model())
    await world.start(modelsTls={"secret": "models-tls", "caFile": certifi.where()})
    condition = await world.condition(
        IMAGE_MODELS, "shapes", "CredentialsReady", "False", "SecretMissing"
    )
    assert "create it with tls.crt and tls.key and ca.crt" in condition["message"]
    assert "models.tls" in condition["message"]
    world.secret("models-tls", **{"tls.crt": "-", "tls.key": "-", "ca.crt": "-"})
    await world.ready(IMAGE_MODELS, "shapes")
    (container,) = world.get(DEPLOYMENTS, "model-shapes")["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"


@contextlib.asynccontextmanager
async def asking(ca_file: pathlib.Path | str) -> AsyncIterator[ModelApps]:
    tls = {"secret": "models-tls", "caFile": str(ca_file)}
    apps = ModelApps(cast(KubeClient, None), settings(modelsTls=tls))  # no token is shown
    try:
        yield apps
    finally:
        await apps.close()


async def test_the_operator_believes_only_model_apps_of_its_authority(
    tmp_path: pathlib.Path,
) -> None:
    files = make_certificates(tmp_path)

    async def healthy(request: web.Request) -> web.Response:
        return web.Response(text="well")

    app = web.Application()
    app.router.add_get("/", healthy)
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        await web.SockSite(runner, listener, ssl_context=files.context()).start()
        async with asking(authority_of(files)) as apps:
            assert apps.url("model-shapes", "art") == "https://model-shapes.art.svc:8000"
            assert await apps.get(f"https://localhost:{port}/") == b"well"
            with pytest.raises(NoAnswer):
                await apps.get(f"https://127.0.0.1:{port}/")
            with pytest.raises(NoAnswer):
                await apps.get(f"http://localhost:{port}/")
        async with asking(certifi.where()) as apps:
            with pytest.raises(NoAnswer, match="certificate verify failed"):
                await apps.get(f"https://localhost:{port}/")
        await runner.cleanup()


async def test_a_provider_needs_a_key_and_no_cluster(world: World) -> None:
    spec = {
        "source": {"provider": {"name": "openai", "model": "gpt-image-1"}},
        "credentialsSecretRef": {"name": "openai"},
    }
    world.apply(manifests.model("paid", **spec))
    await world.start()
    await world.condition(IMAGE_MODELS, "paid", "CredentialsReady", "False", "SecretMissing")
    world.secret("openai", API_KEY="sk-1")
    await world.condition(IMAGE_MODELS, "paid", "CredentialsReady")
    condition = await world.condition(IMAGE_MODELS, "paid", "Ready", "False", "ProviderNotServed")
    assert "use a source whose weights run here" in condition["message"]
    assert not world.server.objects.all(DEPLOYMENTS)
    assert "finalizers" not in world.find(IMAGE_MODELS, "paid")["metadata"]
    assert "sk-1" not in json.dumps(gateway(world))
    assert world.find(SECRETS, "openai") is not None


def house(name: str, block: float, version: int = 1) -> dict[str, Any]:
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "ModerationPolicy",
        "metadata": {"name": name, "namespace": "calotype"},
        "spec": {"version": version, "categories": {"sexual": {"text": {"block": block}}}},
    }


async def test_policies_of_teams_and_adapters_travel_to_moderator_and_gateway(world: World) -> None:
    def team() -> dict[str, Any]:
        return world.teams()["shoes"]

    def beside() -> dict[str, Any]:
        app = json.loads(world.find(CONFIG_MAPS, "model-shapes-app")["data"]["model.json"])
        moderator = next(d for d in app["deployments"] if d["name"] == "Moderator")
        return dict(moderator["user_config"]["policies"])

    for name, block in (("default", 0.6), ("kids", 0.2), ("brand", 0.5), ("other", 0.1)):
        world.apply(house(name, block))
    world.apply(manifests.model())
    world.apply(manifests.adapter(moderationPolicyRef={"name": "brand"}))
    shoes = manifests.model("shoes") | {"kind": "Team"}
    world.apply(shoes | {"spec": {"moderationPolicyRef": {"name": "kids"}}})
    world.apply(manifests.model("bags") | {"kind": "Team", "spec": {"models": ["another"]}})
    await world.start()
    await world.ready(LORA_ADAPTERS, "stripes")
    await world.until(lambda: set(beside()) == {"brand", "kids"}, "the moderator has both")
    assert beside()["kids"]["categories"] == {"sexual": {"text": {"block": 0.2}}}
    world.delete(TEAMS, "bags")
    await world.until(lambda: set(world.teams()) == {"shoes"}, "one team is left")
    assert team()["moderationPolicy"] == "kids"
    (adapter,) = gateway(world)["adapters"]
    assert adapter["spec"]["moderationPolicyRef"] == {"name": "brand"}
    for resource, name in ((LORA_ADAPTERS, "stripes"), (TEAMS, "shoes")):
        conditions = world.find(resource, name)["status"]["conditions"]
        assert all(condition["type"] != "FieldsUsed" for condition in conditions)

    world.apply(house("kids", 0.9, 2))
    await world.condition(TEAMS, "shoes", "Accepted", "False", "PolicyLaxer")
    await world.until(lambda: "refusal" in team(), "the gateway hears of it")
    assert "moderationPolicy" not in team() and "laxer" in team()["refusal"]
    assert team()["keyHashes"], "it may still read what it has"
    await world.until(lambda: set(beside()) == {"brand"}, "nobody is checked by it")

    world.apply(house("kids", 0.3, 3))
    await world.until(lambda: team().get("moderationPolicy") == "kids", "it is stricter again")
    await world.until(lambda: beside().get("kids", {}).get("version") == 3, "in its new version")

    world.apply(house("default", 0.1, 2))
    await world.until(lambda: "refusal" in team(), "the model's policy became the stricter one")


async def test_a_policy_travels_to_the_moderator(world: World) -> None:
    policy = {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "ModerationPolicy",
        "metadata": {"name": "strict", "namespace": "calotype"},
        "spec": {"version": 3, "categories": {"sexual": {"text": {"block": 0.2}}}},
    }
    world.apply(manifests.model(moderationPolicyRef={"name": "strict"}))
    await world.start()
    await world.condition(IMAGE_MODELS, "shapes", "Accepted", "False", "PolicyMissing")
    assert not world.server.objects.all(DEPLOYMENTS), "nothing is drawn without its policy"
    world.apply(policy)
    await world.ready(IMAGE_MODELS, "shapes")
    await world.ready(MODERATION_POLICIES, "strict")
    config = json.loads(world.find(CONFIG_MAPS, "model-shapes-app")["data"]["model.json"])
    moderator = next(d for d in config["deployments"] if d["name"] == "Moderator")
    assert moderator["user_config"]["policy"] == {"name": "strict", "spec": policy["spec"]}

"""Nobody takes the room of others in a configuration, nor names and files that are theirs."""

from __future__ import annotations

import pathlib
from collections.abc import AsyncIterator
from typing import cast

import httpx
import pytest
from pydantic import ValidationError
from tests.operator import manifests
from tests.operator.virtual import World

from calotype.moderation.policy.spec import TERMS_CHARS, PolicySpec
from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    IMAGE_MODELS,
    LORA_ADAPTERS,
    MODERATION_POLICIES,
    SECRETS,
    TEAMS,
)
from calotype.operator.manifests.gateway_config import policy_name
from calotype.operator.testing.cluster import good_fetch
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.config import ImageModel, Source
from calotype.serving.core.errors import ModerationUnavailable, NotFound
from calotype.serving.database.database import Database
from calotype.serving.weights.resolving import local_files
from calotype.serving.wire.fetch_faults import FetchFailed
from calotype.serving.wire.fetch_order import FetchOrder

MOST = 1_000_000
"""Bytes of the data of a ConfigMap, which the API server refuses above 1 MiB."""


@pytest.fixture
async def world() -> AsyncIterator[World]:
    found = World()
    for namespace in ("shop", "elsewhere"):
        found.cluster.namespace(namespace)
    yield found
    await found.kill()
    await found.cluster.close()


def large(name: str, characters: int, namespace: str = "calotype", **spec: object) -> Manifest:
    """A policy with so many characters of terms, whatever admission would say of it."""
    words = [f"{number:0100d}" for number in range(characters // 100)]
    found = manifests.policy(name, 0.2)
    found["metadata"]["namespace"] = namespace
    found["spec"] |= {"terms": [{"category": "hate", "terms": words}], **spec}
    return found


# --- ModerationPolicies -------------------------------------------------------------------------


def test_a_policy_with_too_many_terms_is_refused_by_its_schema() -> None:
    spec = large("big", TERMS_CHARS + 100)["spec"]
    with pytest.raises(ValidationError, match="16,000 characters at most: shorten them"):
        PolicySpec.model_validate(spec)
    PolicySpec.model_validate(large("fits", TERMS_CHARS)["spec"])


async def test_a_policy_that_is_too_large_stops_nothing_but_itself(world: World) -> None:
    world.apply(manifests.model())
    world.apply(manifests.team("shoes", "shop", moderationPolicyRef={"name": "huge"}))
    for namespace in ("shop", "calotype"):
        world.apply(large("huge", 1_200_000, namespace))
    await world.start()
    for namespace in ("shop", "calotype"):
        condition = await world.condition(
            *(MODERATION_POLICIES, "huge", "Accepted", "False", "CapacityExceeded", namespace)
        )
        assert "64,000 bytes" in condition["message"]
    await world.condition(TEAMS, "shoes", "Accepted", "False", "PolicyMissing", "shop")
    world.apply(manifests.adapter())
    await world.ready(LORA_ADAPTERS, "stripes")
    team = await world.until(lambda: world.teams().get("shoes"), "it is known")
    assert "refusal" in team, "nobody is checked by less than was asked for"


async def test_the_policies_of_a_namespace_share_its_room(world: World) -> None:
    for number in range(3):
        world.apply(large(f"p{number}", 13_000, "shop"))
    world.apply(large("p0", 13_000, "elsewhere"))
    await world.start(maxPolicyBytes=30_000)
    for name in ("p0", "p1"):
        await world.ready(MODERATION_POLICIES, name, "shop")
    condition = await world.condition(
        *(MODERATION_POLICIES, "p2", "Accepted", "False", "CapacityExceeded", "shop")
    )
    assert "of one namespace" in condition["message"]
    await world.ready(MODERATION_POLICIES, "p0", "elsewhere")
    world.delete(MODERATION_POLICIES, "p0", "shop")
    await world.ready(MODERATION_POLICIES, "p2", "shop")


async def test_the_releases_own_policies_have_room_before_those_of_others(world: World) -> None:
    refused = ("Accepted", "False", "CapacityExceeded")
    for namespace in ("elsewhere", "shop"):
        world.apply(large("theirs", 13_000, namespace))
    await world.start(maxPoliciesBytes=20_000)
    await world.condition(MODERATION_POLICIES, "theirs", *refused, "shop")
    await world.ready(MODERATION_POLICIES, "theirs", "elsewhere")
    world.apply(large("default", 13_000))
    await world.ready(MODERATION_POLICIES, "default")
    await world.condition(MODERATION_POLICIES, "theirs", *refused, "elsewhere")


@pytest.mark.parametrize(
    "named",
    [
        {"pictureLists": ["/var/lib/calotype/theirs.txt"]},
        {"pictureModels": {"falconsai": "/var/lib/calotype/cache/models/theirs"}},
        {"judge": {"format": "yes-no", "model": "/var/lib/calotype/cache/models/theirs"}},
    ],
    ids=lambda named: next(iter(named)),
)
async def test_policies_of_other_namespaces_name_no_files(world: World, named: Manifest) -> None:
    world.apply(large("files", 100, "shop", **named))
    await world.start()
    condition = await world.condition(
        *(MODERATION_POLICIES, "files", "Accepted", "False", "PathNotAllowed", "shop")
    )
    assert next(iter(named)) in condition["message"]


def test_policies_of_two_namespaces_never_have_one_name() -> None:
    settings = World().settings()
    names = [("calotype", "kids.shop"), ("shop", "kids"), ("calotype", "kids")]
    assert len({policy_name(*name, settings) for name in names}) == 3


# --- keys ---------------------------------------------------------------------------------------


async def test_a_key_is_taken_back_while_the_models_cannot_be_written(world: World) -> None:
    world.apply(manifests.model())
    world.apply(manifests.team("shoes", "shop"))
    await world.start()
    await world.ready(TEAMS, "shoes", "shop")
    await world.until(lambda: "shoes" in world.teams(), "it is known")
    world.server.fail("PATCH", "calotype-gateway-config", status=422, times=10_000)
    world.apply(manifests.adapter())
    world.delete(TEAMS, "shoes", "shop")
    await world.until(lambda: "shoes" not in world.teams(), "its key is void")
    assert world.find(SECRETS, "calotype-key-shoes", "shop") is None


async def test_teams_and_models_fit_into_their_objects(world: World) -> None:
    """However many there are; those that came first are known."""
    for number in range(30):
        aliases = [f"a{number}-{alias}-{'a' * 100}" for alias in range(8)]
        world.apply(manifests.model(f"m{number}", suspend=True, aliases=aliases))
        models = [f"{model:03d}{'m' * 50}" for model in range(60)]
        world.apply(manifests.team(f"t{number}", models=models))
    await world.start(maxConfigBytes=50_000, maxModelBytes=20_000)
    await world.until(lambda: world.teams() and world.gateway().get("models"), "they are written")
    await world.quiet(5)
    assert 5 < len(world.teams()) < 30 and 5 < len(world.gateway()["models"]) < 30
    for name, most in (("teams", 50_000), ("config", 2 * 20_000)):
        found = world.get(CONFIG_MAPS, f"calotype-gateway-{name}")
        assert sum(len(text) for text in found["data"].values()) < most


def test_what_may_be_in_one_object_fits_into_it() -> None:
    settings = World().settings()
    gateway = settings.max_config_bytes + settings.max_model_bytes
    application = settings.max_config_bytes + settings.max_policies_bytes
    assert max(gateway, application) <= MOST


# --- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/var/lib/calotype/cache/adapters/shop/secret/abc/a.safetensors",
        "/var/lib/calotype/cache/trainings/shop/secret/adapter.safetensors",
        "/etc/passwd",
        "/models/loras-of-others/a.safetensors",
    ],
)
async def test_a_path_outside_of_the_allowed_folders_is_refused(world: World, path: str) -> None:
    world.apply(manifests.model(adapters={"namespaces": {"from": "All"}}))
    model = {"name": "shapes", "namespace": "calotype"}
    world.apply(manifests.adapter("a", "elsewhere", source={"path": path}, modelRef=model))
    await world.start(adapterFolders=["/models/loras"])
    condition = await world.condition(
        *(LORA_ADAPTERS, "a", "Accepted", "False", "PathNotAllowed", "elsewhere")
    )
    assert "/models/loras" in condition["message"]


async def test_a_path_that_is_allowed_is_checked_as_every_other_source(world: World) -> None:
    checked: list[Manifest] = []

    def fetch(config: Manifest) -> Manifest:
        checked.append(config)
        return dict(good_fetch(config))

    world.cluster.fetch = fetch
    world.apply(manifests.model())
    world.apply(manifests.adapter("a", source={"path": "/models/loras/a.safetensors"}))
    await world.start(adapterFolders=["/models/loras"])
    await world.ready(LORA_ADAPTERS, "a")
    (order,) = checked
    assert (order["source"], order["volumeDir"]) == (
        {"path": "/models/loras/a.safetensors"},
        "/models/loras",
    )
    assert world.pushed()["a"]["spec"]["source"]["path"].startswith("/var/lib/calotype/cache/")


@pytest.mark.parametrize("kind", ["path", "persistentVolumeClaim"])
def test_a_path_never_leads_up(kind: str) -> None:
    path = "models/loras/../../etc/passwd"
    source = {"path": f"/{path}"} if kind == "path" else {kind: {"claimName": "c", "path": path}}
    with pytest.raises(ValidationError, match="must not have the part"):
        Source.model_validate(source)


def test_a_link_that_leads_out_of_the_allowed_folder_is_not_followed(
    tmp_path: pathlib.Path,
) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"theirs")
    (allowed / "a.safetensors").symlink_to(tmp_path / "secret.safetensors")
    source = Source(path=str(allowed / "a.safetensors"))
    with pytest.raises(FetchFailed, match="leads out"):
        local_files(FetchOrder(kind="adapter", name="a", source=source, volume_dir=allowed))
    with pytest.raises(FetchFailed, match="volumeDir is missing"):
        local_files(FetchOrder(kind="adapter", name="a", source=source))


# --- names --------------------------------------------------------------------------------------


async def test_an_alias_of_another_namespace_needs_the_administrators_word(world: World) -> None:
    world.apply(manifests.model("theirs", "shop", aliases=["dall-e-3"]))
    await world.start()
    condition = await world.condition(
        *(IMAGE_MODELS, "theirs", "Accepted", "False", "NameNotGranted", "shop")
    )
    assert "dall-e-3: shop/theirs" in condition["message"]
    await world.quiet()
    assert world.gateway()["models"] == []
    await world.kill()
    await world.start(modelNames={"dall-e-3": "shop/theirs"})
    await world.condition(IMAGE_MODELS, "theirs", "Accepted", namespace="shop")


async def test_a_name_goes_to_the_releases_namespace_and_both_are_told(world: World) -> None:
    world.apply(manifests.model("flux", "shop"))
    await world.start()
    await world.condition(IMAGE_MODELS, "flux", "Accepted", namespace="shop")
    await world.go_on(5)
    world.apply(manifests.model("flux"))
    await world.condition(IMAGE_MODELS, "flux", "Accepted", "False", "NameConflict", "shop")
    contested = await world.condition(IMAGE_MODELS, "flux", "NamesContested")
    assert "shop/flux" in contested["message"]
    await world.ready(IMAGE_MODELS, "flux")
    world.delete(IMAGE_MODELS, "flux", "shop")
    await world.until(
        lambda: "NamesContested" not in str(world.status(IMAGE_MODELS, "flux")), "it is over"
    )


async def test_the_administrators_list_decides_over_a_name(world: World) -> None:
    world.apply(manifests.model("flux"))
    await world.start(modelNames={"flux": "shop/flux"})
    await world.condition(IMAGE_MODELS, "flux", "Accepted", "False", "NameConflict")
    world.apply(manifests.model("flux", "shop"))
    await world.condition(IMAGE_MODELS, "flux", "Accepted", namespace="shop")


async def test_the_default_model_is_the_administrators(world: World) -> None:
    world.cluster.namespace("aaa")
    world.apply(manifests.model("first", "aaa"))
    await world.start()
    await world.until(lambda: world.gateway().get("models"), "it is known")
    assert "defaultModel" not in world.gateway()
    world.apply(manifests.model("ours"))
    await world.until(lambda: world.gateway().get("defaultModel") == "ours", "ours is")
    await world.kill()
    await world.start(defaultModel="first")
    await world.until(lambda: world.gateway().get("defaultModel") == "first", "the value is")


def test_a_request_without_a_model_goes_to_no_other_than_the_default() -> None:
    def model(name: str) -> ImageModel:
        return ImageModel.model_validate(manifests.model(name))

    catalog = Catalog([])
    catalog.replace([model("theirs"), model("ours")], (), "ours")
    assert catalog.model(None).name == "ours"
    catalog.replace([model("theirs"), model("others")], (), None)
    with pytest.raises(NotFound, match="name one of theirs, others"):
        catalog.model(None)


async def test_what_a_team_has_checked_goes_to_no_model_of_another_namespace() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(503)

    backend = RemoteBackend(cast(Database, None), "internal-token")
    backend._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    names = {"theirs": "aaa", "second": "calotype", "first": "calotype"}
    backend.namespaces = names
    backend.endpoints = {name: f"http://{name}" for name in names}
    backend.default_model = "first"
    with pytest.raises(ModerationUnavailable):
        await backend.moderate(["a prompt"], [])
    assert asked == ["first", "second"]
    await backend.close()

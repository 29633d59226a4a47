"""A Team gets a key of its own, once; the gateway knows it by its hash."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from calotype.operator.kube.resources import CONFIG_MAPS, SECRETS, TEAMS
from calotype.serving.database.accounts.api_keys import KEY_PREFIX, key_digest, make_key

from . import manifests
from .virtual import World


def team(name: str = "shoes", namespace: str = "calotype", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "Team",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def key_of(world: World, name: str = "shoes") -> str:
    secret = world.find(SECRETS, f"calotype-key-{name}")
    return base64.b64decode(secret["data"]["api-key"]).decode()


def hashes(world: World) -> dict[str, list[str]]:
    return {name: entry["keyHashes"] for name, entry in world.teams().items()}


async def test_a_team_gets_a_key_that_the_gateway_knows_by_hash(world: World) -> None:
    world.apply(team(displayName="Shoes", weight=2, quotas={"requestsPerMinute": 60}))
    await world.start()
    status = (await world.ready(TEAMS, "shoes"))["status"]
    key = key_of(world)
    assert key.startswith(KEY_PREFIX)
    assert len(key) == len(make_key())
    assert status["keySecretRef"] == {"name": "calotype-key-shoes", "key": "api-key"}
    assert key.startswith(status["keyPrefix"])
    assert len(status["keyPrefix"]) < 16
    await world.until(lambda: hashes(world).get("shoes") == [key_digest(key)], "gateway knows")
    for name in ("calotype-gateway-config", "calotype-gateway-teams"):
        assert key not in json.dumps(world.find(CONFIG_MAPS, name))
    entry = world.teams()["shoes"]
    assert (entry["weight"], entry["quotas"]) == (2, {"requestsPerMinute": 60})


async def test_raising_rotate_makes_another_key_once(world: World) -> None:
    world.apply(team())
    await world.start()
    await world.ready(TEAMS, "shoes")
    first = key_of(world)
    await world.kill()
    await world.start()
    await world.ready(TEAMS, "shoes")
    await world.quiet()
    assert key_of(world) == first
    world.server.fail("PATCH", "secrets", status=409, times=1)
    world.apply(team(keys={"rotate": 1}))
    await world.until(lambda: key_of(world) != first, "another key")
    second = key_of(world)
    await world.until(
        lambda: hashes(world).get("shoes") == [hashlib.sha256(second.encode()).hexdigest()],
        "the old key ends",
    )
    await world.quiet()
    assert key_of(world) == second


async def test_a_secret_of_that_name_which_is_not_ours_is_left_alone(world: World) -> None:
    world.secret("calotype-key-shoes", **{"api-key": "somebody-elses"})
    world.apply(team())
    await world.start()
    await world.condition(TEAMS, "shoes", "KeyReady", "False", "SecretNotOurs")
    assert key_of(world) == "somebody-elses"
    world.delete(SECRETS, "calotype-key-shoes")
    await world.ready(TEAMS, "shoes")


async def test_a_deleted_team_leaves_no_key(world: World) -> None:
    world.apply(team())
    await world.start()
    await world.ready(TEAMS, "shoes")
    await world.until(lambda: "shoes" in hashes(world), "gateway knows")
    world.delete(TEAMS, "shoes")
    await world.gone(SECRETS, "calotype-key-shoes")
    await world.until(lambda: "shoes" not in hashes(world), "gateway forgets")


async def test_two_teams_of_one_name(world: World) -> None:
    world.cluster.namespace("other")
    world.apply(team(namespace="other"))
    await world.start()
    await world.ready(TEAMS, "shoes", "other")
    await world.go_on(5)
    world.apply(team())
    await world.condition(TEAMS, "shoes", "Accepted", "False", "NameConflict")
    world.delete(TEAMS, "shoes", "other")
    await world.ready(TEAMS, "shoes")


async def test_a_team_with_a_policy_that_is_laxer_than_its_models(world: World) -> None:
    def policy(name: str, block: float) -> dict[str, Any]:
        return {
            "apiVersion": "calotype.dev/v1alpha1",
            "kind": "ModerationPolicy",
            "metadata": {"name": name, "namespace": "calotype"},
            "spec": {"version": 1, "categories": {"hate": {"text": {"block": block}}}},
        }

    world.apply(policy("default", 0.4))
    world.apply(policy("shoes", 0.9))
    world.apply(manifests.model())
    world.apply(team(moderationPolicyRef={"name": "shoes"}))
    await world.start()
    await world.condition(TEAMS, "shoes", "Accepted", "False", "PolicyLaxer")
    world.apply(policy("shoes", 0.3))
    await world.ready(TEAMS, "shoes")

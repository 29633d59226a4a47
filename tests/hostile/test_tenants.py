"""A Team is one object of one namespace, and gives itself no more than an administrator allows."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.operator import manifests
from tests.operator.virtual import World

from calotype.operator.kube.resources import TEAMS
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.cluster.config_sync import ConfigFollower
from calotype.serving.cluster.followed_file import FollowedFile
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.core.errors import Conflict, Unauthenticated
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.accounts.teams import TeamOwner
from calotype.serving.database.database import Database
from calotype.serving.wire.team_owners import OwnedTeam, TeamOwners

ADMIN_KEY = "ct_live_of_the_administrator"
OURS, THEIRS = TeamOwner("shop", "u1"), TeamOwner("elsewhere", "u2")


@pytest.fixture
def database(tmp_path: pathlib.Path) -> Iterator[Database]:
    found = Database.open(f"sqlite:///{tmp_path}/jobs.db")
    found.api_keys.ensure_first(ADMIN_KEY)
    yield found
    found.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    found = World()
    for namespace in ("shop", "elsewhere"):
        found.cluster.namespace(namespace)
    yield found
    await found.kill()
    await found.cluster.close()


# --- the database knows whose a team is ---------------------------------------------------------


def test_a_team_that_exists_is_never_adopted(database: Database) -> None:
    admin = database.api_keys.authenticate(ADMIN_KEY).team_id
    with pytest.raises(Conflict, match="an administrator made"):
        database.teams.claim("default", THEIRS)
    ours = database.teams.claim("shoes", OURS)
    with pytest.raises(Conflict, match="namespace shop"):
        database.teams.claim("shoes", THEIRS)
    assert database.teams.claim("shoes", OURS).id == ours.id
    assert [team.uid for team in database.teams.list_teams() if team.id == admin] == [None]


def test_the_name_of_a_deleted_team_is_not_given_out_again(database: Database) -> None:
    ours = database.teams.claim("shoes", OURS)
    database.api_keys.declare_keys("shoes", [], [])
    reborn = TeamOwner("shop", "u1-of-another-life")
    with pytest.raises(Conflict):
        database.teams.claim("shoes", reborn)
    assert database.teams.claim("shoes", reborn, take_over=True).id == ours.id
    with pytest.raises(Conflict):
        database.teams.claim("shoes", OURS)


def test_a_team_of_a_version_without_owners_gets_its_first_one(database: Database) -> None:
    database.api_keys.declare_team({"name": "shoes", "keyHashes": ["a" * 64]})
    ours = database.teams.claim("shoes", OURS)
    with pytest.raises(Conflict):
        database.teams.claim("shoes", THEIRS)
    assert ours.uid == "u1"
    database.api_keys.declare_team({"name": "hats", "keyHashes": ["b" * 64]})
    database.api_keys.declare_keys("hats", [], [])
    with pytest.raises(Conflict):
        database.teams.claim("hats", THEIRS)  # it was deleted before there were owners


# --- the gateway --------------------------------------------------------------------------------


class Gateway:
    """What a gateway does with the operator's files."""

    def __init__(self, folder: pathlib.Path, database: Database) -> None:
        self.folder, self.database = folder, database
        self.catalog, self.said = Catalog([]), list[str]()
        self._follower = ConfigFollower(
            FollowedFile(folder / "gateway.json"),
            FollowedFile(folder / "teams.json"),
            *(self.catalog, RemoteBackend(database, "token"), database, self.said.append),
        )

    async def told(self, *teams: JsonObject) -> None:
        (self.folder / "teams.json").write_text(json.dumps({"teams": teams}))
        await self._follower.look()

    def opens(self, key: str) -> str | None:
        """The team of a key; None = it opens nothing."""
        try:
            found = self.database.teams.get_team(self.database.api_keys.authenticate(key).team_id)
        except Unauthenticated:
            return None
        return None if found is None else found.name


@pytest.fixture
def gateway(tmp_path: pathlib.Path, database: Database) -> Gateway:
    return Gateway(tmp_path, database)


def team(name: str, owner: TeamOwner, key: str, **more: object) -> JsonObject:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return {"name": name, **vars_of(owner), "keyHashes": [digest], **more}


def vars_of(owner: TeamOwner) -> JsonObject:
    return {"namespace": owner.namespace, "uid": owner.uid}


async def test_a_team_of_another_namespace_gets_no_key_limits_or_pictures(
    gateway: Gateway, database: Database
) -> None:
    await gateway.told(team("shoes", OURS, "ct_live_ours"))
    before = database.teams.list_teams()
    await gateway.told(
        team("shoes", THEIRS, "ct_live_theirs", weight=1000.0, refusal="It is closed."),
        team("default", THEIRS, "ct_live_admins", weight=1000.0, refusal="It is closed."),
    )
    assert gateway.opens("ct_live_theirs") is gateway.opens("ct_live_admins") is None
    assert gateway.opens(ADMIN_KEY) == "default"
    assert database.teams.list_teams() == before
    assert gateway.catalog.closed("default") is gateway.catalog.closed("shoes") is None
    assert any("Team elsewhere/shoes is taken" in sentence for sentence in gateway.said)


async def test_a_deleted_team_is_inherited_only_where_an_administrator_says_so(
    gateway: Gateway,
) -> None:
    await gateway.told(team("shoes", OURS, "ct_live_ours"))
    await gateway.told()
    assert gateway.opens("ct_live_ours") is None
    await gateway.told(team("shoes", THEIRS, "ct_live_theirs"))
    assert gateway.opens("ct_live_theirs") is None
    await gateway.told(team("shoes", THEIRS, "ct_live_theirs", takesOver=True))
    assert gateway.opens("ct_live_theirs") == "shoes"


# --- the operator -------------------------------------------------------------------------------


async def test_what_a_team_gives_itself_is_bounded_by_its_namespaces_grant(world: World) -> None:
    greedy = {"weight": 900, "quotas": {"concurrentJobs": 100_000}}
    for namespace in ("calotype", "shop", "elsewhere"):
        world.apply(manifests.team(f"of-{namespace}", namespace, **greedy))
    quotas = {"concurrentJobs": 10, "requestsPerMinute": 60}
    granted = {"weight": 4, "models": ["shapes"]}
    await world.start(teamGrants={"default": {"quotas": quotas}, "namespaces": {"shop": granted}})
    for namespace in ("shop", "elsewhere"):
        await world.condition(
            TEAMS, f"of-{namespace}", "Accepted", reason="Bounded", namespace=namespace
        )
    await world.ready(TEAMS, "of-calotype")
    teams = await world.until(lambda: len(world.teams()) == 3 and world.teams(), "all are known")
    assert (teams["of-elsewhere"]["weight"], teams["of-elsewhere"]["quotas"]) == (1, quotas)
    assert (teams["of-shop"]["weight"], teams["of-shop"]["models"]) == (4, ["shapes"])
    assert teams["of-calotype"]["weight"] == 900, "the release's namespace is the administrator's"


async def test_a_team_without_quotas_has_those_of_its_grant(world: World) -> None:
    world.apply(manifests.team("shoes", "shop"))
    await world.start(teamGrants={"default": {"quotas": {"gpuSecondsPerDay": 60}}})
    await world.ready(TEAMS, "shoes", "shop")
    entry = await world.until(lambda: world.teams().get("shoes"), "it is known")
    assert entry["quotas"] == {"gpuSecondsPerDay": 60}


async def test_models_that_are_not_granted_are_refused_and_never_mean_all(world: World) -> None:
    world.apply(manifests.team("shoes", "shop", models=["flux-2-dev"]))
    await world.start(teamGrants={"default": {"models": ["shapes"]}})
    condition = await world.condition(
        TEAMS, "shoes", "Accepted", "False", "GrantExceeded", namespace="shop"
    )
    assert "shapes" in condition["message"]
    await world.quiet()
    assert "shoes" not in world.teams()


async def test_a_namespace_has_as_many_teams_as_it_is_granted(world: World) -> None:
    world.apply(manifests.team("first", "shop"))
    await world.start(teamGrants={"default": {"teams": 1}})
    await world.ready(TEAMS, "first", "shop")
    await world.go_on(5)
    world.apply(manifests.team("second", "shop"))
    world.apply(manifests.team("third", "elsewhere"))
    await world.condition(TEAMS, "second", "Accepted", "False", "GrantExceeded", namespace="shop")
    await world.ready(TEAMS, "third", "elsewhere")
    world.delete(TEAMS, "first", "shop")
    await world.ready(TEAMS, "second", "shop")


async def test_no_team_is_given_the_name_of_the_administrators(world: World) -> None:
    world.apply(manifests.team("default"))
    world.apply(manifests.team("default", "shop"))
    await world.start()
    for namespace in ("calotype", "shop"):
        await world.condition(
            TEAMS, "default", "Accepted", "False", "NameReserved", namespace=namespace
        )
    await world.quiet()
    assert world.teams() == {}


async def test_whom_an_administrator_names_has_the_name_before_older_ones(world: World) -> None:
    world.apply(manifests.team("shoes", "elsewhere"))
    await world.start(teamGrants={"namespaces": {"shop": {"takes": ["shoes"]}}})
    await world.ready(TEAMS, "shoes", "elsewhere")
    await world.go_on(5)
    world.apply(manifests.team("shoes", "shop"))
    await world.ready(TEAMS, "shoes", "shop")
    await world.condition(
        TEAMS, "shoes", "Accepted", "False", "NameConflict", namespace="elsewhere"
    )
    entry = await world.until(
        lambda: (found := world.teams().get("shoes")) and found["namespace"] == "shop" and found,
        "the gateways hear of it",
    )
    assert entry["takesOver"] is True
    assert entry["uid"] == world.get(TEAMS, "shoes", "shop")["metadata"]["uid"]


async def test_a_team_says_that_its_name_is_anothers_in_the_job_database(world: World) -> None:
    world.secret("calotype-internal", token="the-internal-token")
    ref = {"name": "calotype-internal", "key": "token"}
    world.apply(manifests.team("shoes", "shop"))
    await world.start(internalTokenSecretRef=ref)
    await world.ready(TEAMS, "shoes", "shop")  # no gateway answers yet
    gone = OwnedTeam(name="shoes", namespace="shop", uid="of-another-life")
    admins = OwnedTeam(name="staff")
    world.cluster.apps.owners = TeamOwners(teams=[gone, admins])
    world.apply(manifests.team("staff", "elsewhere"))
    for name, namespace in (("shoes", "shop"), ("staff", "elsewhere")):
        condition = await world.condition(
            TEAMS, name, "Accepted", "False", "NameConflict", namespace=namespace
        )
        assert "takes in operator.settings.teamGrants" in condition["message"]
    uid = world.get(TEAMS, "staff", "elsewhere")["metadata"]["uid"]
    mine = OwnedTeam(name="staff", namespace="elsewhere", uid=uid)
    world.cluster.apps.owners = TeamOwners(teams=[gone, mine])
    await world.ready(TEAMS, "staff", "elsewhere")
    await world.kill()
    await world.start(teamGrants={"namespaces": {"shop": {"takes": ["shoes"]}}})
    await world.ready(TEAMS, "shoes", "shop")

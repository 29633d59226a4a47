"""Every route, asked by every kind of key: `servers.route_rights` says what each may do.

The rows are compared with the application's own routes, so a route without a row fails.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from servers.gateway import QUICK, running
from servers.route_rights import PROMPT, REVIEW, ROWS, World, fill
from servers.routes import routes_of

from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.core.errors import Conflict
from calotype.serving.database.accounts.api_keys import SCOPES, key_digest
from calotype.serving.database.accounts.teams import TeamOwner

ROUTES = pytest.mark.parametrize("route", ROWS, ids=lambda route: f"{route[0]} {route[1]}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    still = {
        "webhook_seconds": None,
        "batch_seconds": None,
        "sweep_seconds": None,
        "dataset_seconds": None,
    }
    settings = GatewaySettings(hangup_grace=0, **(QUICK | still))
    with running(tmp_path_factory.mktemp("world"), settings) as service:
        usual = ("images", "jobs", "adapters", "trainings")
        found = World(service, service.database.api_keys.create(team="owner", scopes=usual)[0])
        fill(found)
        yield found


def is_refused(answer: httpx.Response, status: int) -> bool:
    return answer.status_code == status and "error" in answer.json()


def test_every_route_has_a_row_here(world: World) -> None:
    assert set(routes_of(world.service.app.routes)) == set(ROWS)


@pytest.fixture(scope="module")
def invalid_keys(world: World) -> list[str | None]:
    """None, an unknown one, one that was revoked, one that was rotated away; of a team that is
    deleted, and of another object that takes up its name."""
    keys = world.service.database.api_keys
    revoked, record = keys.create(team="owner", scopes=SCOPES)
    keys.revoke_key(record.id)
    old, rotated = keys.create(team="owner", scopes=SCOPES)
    keys.expire_key(rotated.id, 0.0)
    deleted, successor = "ct_live_" + "d" * 43, "ct_live_" + "s" * 43
    former = {"name": "former", "keyHashes": [key_digest(deleted)]}
    keys.declare_team(former, TeamOwner("studio", "uid-1"))
    keys.declare_keys("former", [], [])
    with pytest.raises(Conflict, match="taken"):
        keys.declare_team(
            {"name": "former", "keyHashes": [key_digest(successor)]}, TeamOwner("rivals", "uid-2")
        )
    return [None, "ct_live_" + "x" * 43, revoked, old, deleted, successor]


@ROUTES
def test_without_a_valid_key_nobody_is_answered(
    world: World, route: tuple[str, str], invalid_keys: list[str | None]
) -> None:
    answers = [world.ask(route, key) for key in invalid_keys]
    if ROWS[route].scopes:
        assert all(is_refused(answer, 401) for answer in answers)
        assert all(PROMPT not in answer.text for answer in answers)
    else:
        assert all(answer.status_code == 200 for answer in answers)
        private = [world.ids[kind] for kind in world.ids if kind != "model"]
        assert all(secret not in answer.text for answer in answers for secret in private)


@ROUTES
def test_a_key_without_the_scope_is_refused(world: World, route: tuple[str, str]) -> None:
    row, nobodys = ROWS[route], dict.fromkeys(world.ids, "none")
    for scope in SCOPES if row.scopes else ():
        answer = world.ask(route, world.key("bystander", scope), bare=True, **nobodys)
        enough = scope in (*row.scopes, "admin")
        assert (answer.status_code not in (401, 403)) is enough, (scope, answer.text)


@ROUTES
def test_what_belongs_to_a_team_is_not_there_for_others(
    world: World, route: tuple[str, str]
) -> None:
    row = ROWS[route]
    if not (row.names or row.lists) or row.shared or "moderation" in row.scopes:
        return
    for key in (world.key("other", *row.scopes), world.key("other", *row.scopes, "admin")):
        theirs = world.ask(route, key)
        assert PROMPT not in theirs.text
        if row.names:
            never = world.ask(route, key, **{row.names: "none"})
            assert (theirs.status_code, never.status_code) == (404, 404)
            named = theirs.text.replace(world.ids[row.names], "none")
            assert named == never.text, "nothing tells another team's object from none"
        else:
            assert not [kind for kind, known in world.ids.items() if known in theirs.text]


def test_a_case_is_for_its_team_and_for_reviewers(world: World) -> None:
    route = ("GET", "/v1/moderation/cases/{case_id}")
    assert world.ask(route, world.key("other", "images")).status_code == 404
    for key in (world.owner, world.key("other", "moderation"), world.key("other", "admin")):
        assert world.ask(route, key).json()["id"] == world.ids["case"]


@ROUTES
def test_quotas_of_requests_hold(world: World, route: tuple[str, str]) -> None:
    key = world.key("spent", *SCOPES)
    world.service.database.teams.set_team("spent", requests_per_minute=0)
    answer = world.ask(route, key)
    assert is_refused(answer, 429) if ROWS[route].counted else answer.status_code != 429


@ROUTES
def test_no_team_may_ask_without_end(
    impatient: World, world: World, route: tuple[str, str]
) -> None:
    impatient.ids = world.ids
    answers = [impatient.ask(route, impatient.owner, bare=True) for _ in range(2)]
    limited = [answer for answer in answers if answer.status_code == 429]
    assert bool(limited) is bool(ROWS[route].scopes)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = GatewaySettings(hangup_grace=0, **QUICK, team_requests_per_second=0.01)
    with running(tmp_path_factory.mktemp("impatient"), settings) as service:
        yield World(service, service.key)


@ROUTES
def test_a_team_that_is_closed_makes_nothing(world: World, route: tuple[str, str]) -> None:
    catalog, service = world.service.catalog, world.service
    other = ("/v1/jobs", "/v1/moderations", "/v1/trainings")
    makes = route[1].startswith("/v1/images/") or route[1] in other
    if route[0] != "POST" or not makes:
        return
    catalog.close({"shut": "it is under review."})
    try:
        answer = world.ask(route, world.key("shut", *SCOPES))
    finally:
        catalog.close({})
    assert is_refused(answer, 403) and "under review" in answer.text
    shut = service.database.teams.ensure_team("shut")
    assert not service.database.jobs.list_jobs(shut.id, limit=1)


@ROUTES
def test_the_team_itself_is_answered(world: World, route: tuple[str, str]) -> None:
    row, key = ROWS[route], world.owner
    if row.scopes == REVIEW:
        key = world.key("reviewers", *SCOPES)
    if row.names in ("case", "takedown", "revocation", "origin") and row.shared:
        return  # tests/serving/api/routes/test_cases.py, test_takedowns.py, test_rights.py
    answer = world.ask(route, key)
    # A training that has ended is neither suspended nor promoted.
    ended = row.names == "training" and route[0] == "POST" and answer.status_code == 409
    assert answer.status_code < 400 or ended, answer.text
    if route[0] == "DELETE":
        fill(world)

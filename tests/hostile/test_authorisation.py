"""Every route, asked by every kind of key: what each may do is written down here, and nothing else.

The rows are compared with the application's own routes, so a route without a row fails.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from PIL import Image
from servers.gateway import QUICK, Service, running
from servers.routes import routes_of

from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.core.errors import Conflict
from calotype.serving.database.accounts.api_keys import SCOPES, key_digest
from calotype.serving.database.accounts.teams import TeamOwner

PROMPT = "the owners own secret fox"
Content = Callable[["World"], dict[str, Any]]


def json_of(**body: Any) -> Content:
    return lambda world: {"json": body}


def nothing(world: World) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Row:
    """What a route demands, and whom it answers.

    Args:
        scopes: any of these, or admin; empty = it needs no key.
        names: the kind of object in its path, which only its own team may see; "" = it has none.
        shared: the object in its path is for every team (with the scope).
        lists: its answer tells of the team's own objects.
        counted: it is one of the team's requests a minute.
    """

    scopes: tuple[str, ...]
    names: str = ""
    shared: bool = False
    lists: bool = False
    counted: bool = False
    content: Content = nothing


IMAGES, JOBS, REVIEW, TRAININGS = ("images",), ("jobs",), ("moderation",), ("trainings",)
PUBLIC: tuple[str, ...] = ()


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    return file.getvalue()


def upload(name: str, **more: str) -> Content:
    return lambda world: {"files": {name: ("a.png", picture(), "image/png")}, "data": more}


def batch_of(world: World) -> dict[str, Any]:
    body = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    return {"json": body | {"input_file_id": world.ids["file"]}}


ENDPOINT = json_of(url="https://hooks.example/x", event_types=["image.job.succeeded"])
DECIDE = json_of(verdict="dismissed", note="")

ROWS: dict[tuple[str, str], Row] = {
    ("POST", "/v1/images/generations"): Row(IMAGES, counted=True, content=json_of(prompt="x")),
    ("POST", "/v1/images/edits"): Row(IMAGES, counted=True, content=upload("image", prompt="x")),
    ("POST", "/v1/images/variations"): Row(IMAGES, counted=True, content=upload("image")),
    ("POST", "/v1/jobs"): Row(JOBS, counted=True, content=json_of(input={"prompt": "x"})),
    ("GET", "/v1/jobs"): Row(JOBS, lists=True),
    ("GET", "/v1/jobs/{job_id}"): Row(JOBS, names="job"),
    ("POST", "/v1/jobs/{job_id}/cancel"): Row(JOBS, names="job"),
    ("GET", "/v1/jobs/{job_id}/events"): Row(JOBS, names="job"),
    ("GET", "/v1/models"): Row(IMAGES),
    ("GET", "/v1/models/{name:path}"): Row(IMAGES, names="model", shared=True),
    ("POST", "/v1/moderations"): Row(IMAGES, counted=True, content=json_of(input="x")),
    ("POST", "/v1/moderation/appeals"): Row(
        IMAGES,
        counted=True,
        content=lambda world: {"json": {"decision_id": world.ids["decision"], "reason": "x"}},
    ),
    ("POST", "/v1/moderation/reports"): Row(
        IMAGES,
        counted=True,
        content=lambda world: {"json": {"asset_id": world.ids["asset"], "reason": "x"}},
    ),
    ("GET", "/v1/moderation/cases/{case_id}"): Row(("images", "moderation"), names="case"),
    ("GET", "/v1/moderation/cases"): Row(REVIEW),
    ("POST", "/v1/moderation/cases/take"): Row(REVIEW),
    ("POST", "/v1/moderation/cases/{case_id}/decide"): Row(
        REVIEW, names="case", shared=True, content=DECIDE
    ),
    ("GET", "/v1/moderation/cases/{case_id}/picture"): Row(REVIEW, names="case", shared=True),
    ("POST", "/v1/moderation/takedowns"): Row(
        REVIEW,
        content=lambda world: {
            "json": {
                "image": base64.b64encode(picture()).decode(),
                "category": "violence",
                "reason": "x",
                "dry_run": True,
            }
        },
    ),
    ("GET", "/v1/moderation/takedowns"): Row(REVIEW),
    ("DELETE", "/v1/moderation/takedowns/{takedown_id}"): Row(
        REVIEW, names="takedown", shared=True
    ),
    ("POST", "/v1/datasets"): Row(TRAININGS, counted=True, content=upload("file")),
    ("GET", "/v1/datasets"): Row(TRAININGS, lists=True),
    ("GET", "/v1/datasets/{dataset_id}"): Row(TRAININGS, names="dataset"),
    ("DELETE", "/v1/datasets/{dataset_id}"): Row(TRAININGS, names="dataset"),
    ("POST", "/v1/rights/revocations"): Row(
        REVIEW, content=json_of(picture_sha256="a" * 64, reason="x", dry_run=True)
    ),
    ("GET", "/v1/rights/revocations"): Row(REVIEW),
    ("DELETE", "/v1/rights/revocations/{picture_sha256}"): Row(
        REVIEW, names="revocation", shared=True
    ),
    ("POST", "/v1/rights/adapters"): Row(
        REVIEW,
        content=json_of(
            digest="sha256:x", name="x", dataset_digest="", pictures=[{"sha256": "a" * 64}]
        ),
    ),
    ("GET", "/v1/rights/adapters/{digest}"): Row(REVIEW, names="origin", shared=True),
    ("POST", "/v1/files"): Row(IMAGES, counted=True, content=upload("file", purpose="vision")),
    ("GET", "/v1/files"): Row(IMAGES, lists=True),
    ("GET", "/v1/files/{file_id}"): Row(IMAGES, names="file"),
    ("GET", "/v1/files/{file_id}/content"): Row(IMAGES, names="file"),
    ("DELETE", "/v1/files/{file_id}"): Row(IMAGES, names="file"),
    ("POST", "/v1/batches"): Row(IMAGES, counted=True, content=batch_of),
    ("GET", "/v1/batches"): Row(IMAGES, lists=True),
    ("GET", "/v1/batches/{batch_id}"): Row(IMAGES, names="batch"),
    ("POST", "/v1/batches/{batch_id}/cancel"): Row(IMAGES, names="batch"),
    ("GET", "/v1/assets/{asset_id}"): Row(IMAGES, names="asset"),
    ("GET", "/v1/assets/{asset_id}/content"): Row(IMAGES, names="asset"),
    ("DELETE", "/v1/assets/{asset_id}"): Row(IMAGES, names="asset"),
    ("GET", "/v1/webhook_event_types"): Row(JOBS),
    ("GET", "/v1/webhooks/default/secret"): Row(JOBS, lists=True),
    ("POST", "/v1/webhook_endpoints"): Row(JOBS, counted=True, content=ENDPOINT),
    ("GET", "/v1/webhook_endpoints"): Row(JOBS, lists=True),
    ("GET", "/v1/webhook_endpoints/{endpoint_id}"): Row(JOBS, names="endpoint"),
    ("POST", "/v1/webhook_endpoints/{endpoint_id}"): Row(
        JOBS, names="endpoint", content=json_of(name="x")
    ),
    ("DELETE", "/v1/webhook_endpoints/{endpoint_id}"): Row(JOBS, names="endpoint"),
    ("POST", "/v1/webhook_endpoints/{endpoint_id}/rotate_secret"): Row(JOBS, names="endpoint"),
    ("POST", "/v1/webhook_endpoints/{endpoint_id}/test"): Row(JOBS, names="endpoint", counted=True),
    ("GET", "/v1/webhook_deliveries"): Row(JOBS, lists=True),
    ("GET", "/v1/webhook_deliveries/{delivery_id}"): Row(JOBS, names="delivery"),
    ("POST", "/v1/webhook_deliveries/{delivery_id}/redeliver"): Row(
        JOBS, names="delivery", counted=True
    ),
    ("GET", "/v1/usage"): Row(JOBS, lists=True),
    ("GET", "/healthz"): Row(PUBLIC),
    ("GET", "/readyz"): Row(PUBLIC),
    ("GET", "/metrics"): Row(PUBLIC),
    ("GET", "/docs"): Row(PUBLIC),
    ("GET", "/docs/oauth2-redirect"): Row(PUBLIC),
    ("GET", "/redoc"): Row(PUBLIC),
    ("GET", "/openapi.json"): Row(PUBLIC),
}
ROUTES = pytest.mark.parametrize("route", ROWS, ids=lambda route: f"{route[0]} {route[1]}")


@dataclass
class World:
    """A gateway, a team that owns one object of each kind, and others that would like to."""

    service: Service
    owner: str
    """Key of the team that owns everything, with every scope but moderation and admin."""
    ids: dict[str, str] = field(default_factory=dict)
    client: httpx.Client = field(init=False)
    keys: dict[tuple[str, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = self.service.http("none")

    def key(self, team: str, *scopes: str) -> str:
        """A key of that team; the same one each time."""
        name = (team, *scopes)
        if name not in self.keys:
            made = self.service.database.api_keys.create(team=team, scopes=scopes)
            self.keys[name] = made[0]
        return self.keys[name]

    def ask(
        self, route: tuple[str, str], key: str | None, *, bare: bool = False, **ids: str
    ) -> httpx.Response:
        """One request; ``ids`` replace those of the owner's objects, ``bare`` leaves out a body."""
        method, path = route
        row, known = ROWS[route], self.ids | ids
        place = known.get(row.names, "none")
        url = "/".join(place if part.startswith("{") else part for part in path.split("/"))
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        content = {} if bare else row.content(self)
        return self.client.request(method, url, headers=headers, **content)


def fill(world: World) -> None:
    """One object of each kind, of the owner."""
    database, client = world.service.database, world.service.http(world.owner)
    drawn = client.post("/v1/images/generations", json={"prompt": PROMPT}).json()
    job = client.get(f"/v1/jobs/{drawn['job_id']}").json()
    no = client.post("/v1/images/generations", json={"prompt": "a forbidden thing"}).json()
    team = database.teams.ensure_team("owner").id
    line = b'{"custom_id": "a", "url": "/v1/images/generations", "body": {"prompt": "x"}}'
    file = client.post("/v1/files", files={"file": ("b.jsonl", line)}, data={"purpose": "batch"})
    world.ids |= {
        "job": drawn["job_id"],
        "asset": job["output"]["images"][0]["asset_id"],
        "file": file.json()["id"],
        "model": "shapes",
        "team": team,
        "decision": no["error"]["moderation"]["decision_id"],
    }
    world.ids["batch"] = client.post("/v1/batches", **batch_of(world)).json()["id"]
    endpoint = client.post("/v1/webhook_endpoints", **ENDPOINT(world)).json()["id"]
    world.ids["endpoint"] = endpoint
    sent = client.post(f"/v1/webhook_endpoints/{endpoint}/test", json={})
    world.ids["delivery"] = sent.json()["id"]
    case = client.post(
        "/v1/moderation/reports", json={"asset_id": world.ids["asset"], "reason": "x"}
    )
    world.ids["case"] = case.json()["id"]
    made = client.post("/v1/datasets", files={"file": ("a.png", picture())})
    world.ids["dataset"] = made.json()["id"]
    assert not [kind for kind, found in world.ids.items() if not found]


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
    makes = route[1].startswith("/v1/images/") or route[1] in ("/v1/jobs", "/v1/moderations")
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
    assert answer.status_code < 400, answer.text
    if route[0] == "DELETE":
        fill(world)

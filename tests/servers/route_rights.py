"""What each route of the API demands of a key, and a service with one object of each kind.

The rows are compared with the application's own routes by tests/hostile/test_authorisation.py.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image
from servers.gateway import Service

from calotype.serving.database.training.datasets import DatasetRecord
from calotype.serving.jobs.records import new_id

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
    ("POST", "/v1/images/estimates"): Row(IMAGES, content=json_of(prompt="x")),
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
    ("POST", "/v1/trainings"): Row(
        TRAININGS,
        counted=True,
        content=lambda world: {"json": {"dataset": world.ids["prepared"], "name": "zorbl"}},
    ),
    ("GET", "/v1/trainings"): Row(TRAININGS, lists=True),
    ("GET", "/v1/trainings/{training_id}"): Row(TRAININGS, names="training"),
    ("GET", "/v1/trainings/{training_id}/events"): Row(TRAININGS, names="training"),
    ("GET", "/v1/trainings/{training_id}/checkpoints"): Row(TRAININGS, names="training"),
    ("GET", "/v1/trainings/{training_id}/samples"): Row(TRAININGS, names="training"),
    ("POST", "/v1/trainings/{training_id}/cancel"): Row(TRAININGS, names="training"),
    ("POST", "/v1/trainings/{training_id}/suspend"): Row(TRAININGS, names="training"),
    ("POST", "/v1/trainings/{training_id}/resume"): Row(TRAININGS, names="training"),
    ("POST", "/v1/trainings/{training_id}/promote"): Row(TRAININGS, names="training"),
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
    world.ids["prepared"] = new_id("dataset")
    database.datasets.add_dataset(
        DatasetRecord(
            id=world.ids["prepared"],
            team_id=team,
            name="pictures.zip",
            file_id=world.ids["file"],
            sha256="ab" * 32,
            settings={},
            status="ready",
            created=1.0,
        )
    )
    wanted = {"dataset": world.ids["prepared"], "name": "zorbl"}
    world.ids["training"] = client.post("/v1/trainings", json=wanted).json()["id"]
    # Ended, so that its events end too.
    client.post(f"/v1/trainings/{world.ids['training']}/cancel")
    assert not [kind for kind, found in world.ids.items() if not found]

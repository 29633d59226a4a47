"""/v1/trainings: what is asked for, what is told, and what is refused with code and field."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers.gateway import Service, running

from calotype.serving.core.errors import Conflict
from calotype.serving.database.training.datasets import DatasetRecord
from calotype.serving.database.training.training_records import Result


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Service]:
    with running(tmp_path) as found:
        yield found


def data_set(service: Service, status: str = "ready", **settings: Any) -> str:
    team = service.database.teams.ensure_team("default").id
    number = len(service.database.datasets.list_datasets(team, limit=50))
    record = DatasetRecord(
        id=f"dataset_{number}",
        team_id=team,
        name="pictures.zip",
        file_id="file_1",
        sha256="ab" * 32,
        settings={"trigger_word": "zorbl"} | settings,
        status=status,
        created=1.0 + number,
        report={"ok": True, "pictures": 20},
    )
    service.database.datasets.add_dataset(record)
    return record.id


def post(service: Service, path: str = "", **body: Any) -> httpx.Response:
    return service.http().post(f"/v1/trainings{path}", json=body)


def finish(service: Service, outcome: str) -> None:
    found = service.database.trainings.lease(["shapes"], 60)
    assert found is not None
    told = ("step", {"sequence": 1, "step": 400, "total_steps": 400, "loss": 0.1})
    sample = ("sample_drawn", {"sequence": 2, "step": 400, "file": "samples/a.png"})
    saved = ("checkpoint_saved", {"sequence": 3, "step": 400, "file": "checkpoints/400"})
    trainings = service.database.trainings
    trainings.beat(found.id, found.fence, 60, 80.0, [told, sample, saved])
    report = {"outcome": outcome, "gates": []}
    trainings.finish(found.id, found.fence, Result("file_2", "cd" * 32, report))


def test_a_training_is_made_followed_and_promoted(service: Service) -> None:
    answer = post(service, dataset=data_set(service), name="zorbl", class_words=["circle"])
    assert answer.status_code == 202
    made = answer.json()
    assert (made["status"], made["model"], made["usage"]["cost"]) == ("queued", "shapes", 0.0)
    assert made["settings"]["trigger_word"] == "zorbl"
    assert made["settings"]["acceptance"]["onPass"] == "promote"
    finish(service, "staged")
    path = f"/{made['id']}"
    seen = service.http().get(f"/v1/trainings{path}").json()
    assert (seen["status"], seen["progress"]["loss"]) == ("succeeded", 0.1)
    assert (seen["promoted_at"], seen["usage"]["device_seconds"]) == (None, 80.0)
    events = service.http().get(f"/v1/trainings{path}/events").text
    names = [line[7:] for line in events.splitlines() if line.startswith("event: ")]
    assert names == [
        *("training.queued", "training.started", "training.step", "training.sample_drawn"),
        *("training.checkpoint_saved", "training.succeeded"),
    ]
    rest = service.http().get(f"/v1/trainings{path}/events", headers={"last-event-id": "5"})
    assert "training.succeeded" in rest.text and "training.step" not in rest.text
    for part, file in (("checkpoints", "checkpoints/400"), ("samples", "samples/a.png")):
        (one,) = service.http().get(f"/v1/trainings{path}/{part}").json()["data"]
        assert one["file"] == file
    assert post(service, f"{path}/promote").json()["promoted_at"] is not None
    assert [t["id"] for t in service.http().get("/v1/trainings").json()["data"]] == [made["id"]]


def test_a_dry_run_tells_report_time_and_price_and_makes_nothing(service: Service) -> None:
    dataset = data_set(service)
    first = post(service, dataset=dataset, name="a", dry_run=True).json()
    assert first["dataset"] == {"ok": True, "pictures": 20}
    assert first["estimate"]["steps"] == 400
    assert first["estimate"]["seconds"] is None
    post(service, dataset=dataset, name="zorbl")
    finish(service, "promoted")
    quote = post(service, dataset=dataset, name="a", dry_run=True, steps=100)
    assert quote.status_code == 200
    assert quote.json()["estimate"] == {
        "steps": 100, "step_seconds": 0.2, "seconds": 20.0, "cost": 0.0
    }  # fmt: skip
    assert len(service.http().get("/v1/trainings").json()["data"]) == 1


def test_suspend_resume_and_cancel(service: Service) -> None:
    path = "/" + post(service, dataset=data_set(service), name="zorbl").json()["id"]
    for order, status in (("suspend", "suspended"), ("resume", "queued"), ("cancel", "canceled")):
        assert post(service, f"{path}/{order}").json()["status"] == status
    refused = post(service, f"{path}/resume")
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "training_over"


def test_what_was_refused_is_not_promoted(service: Service) -> None:
    path = "/" + post(service, dataset=data_set(service), name="zorbl").json()["id"]
    early = post(service, f"{path}/promote")
    assert early.json()["error"]["code"] == "training_not_finished"
    finish(service, "refused")
    late = post(service, f"{path}/promote")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "acceptance_failed")


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"dataset": "dataset_x"}, 404, "not_found", "dataset"),
        ({"name": "Not A Name"}, 400, None, "name"),
        ({"steps": 0}, 400, None, "steps"),
        ({"preset": "best"}, 400, None, "preset"),
        ({"acceptance": {"pictures": 1}}, 400, None, "acceptance.pictures"),
        ({"colour": "red"}, 400, None, "colour"),
    ],
)
def test_a_wrong_field_is_named(
    service: Service, change: dict[str, Any], status: int, code: str | None, param: str
) -> None:
    body = {"dataset": data_set(service), "name": "zorbl"} | change
    answer = post(service, **body)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert error["param"] == param
    assert code is None or error["code"] == code
    assert error["message"]


def test_a_data_set_that_is_not_ready_and_a_taken_name_are_conflicts(service: Service) -> None:
    waiting = post(service, dataset=data_set(service, "checking"), name="zorbl")
    assert waiting.json()["error"]["code"] == "dataset_not_ready"
    other = service.database.teams.ensure_team("other").id
    post(service, dataset=data_set(service), name="zorbl")
    (mine,) = service.database.trainings.list_trainings(
        service.database.teams.ensure_team("default").id, limit=2
    )
    with pytest.raises(Conflict, match="is taken"):
        service.database.trainings.add_training(
            dataclasses.replace(mine, id="training_2", team_id=other)
        )

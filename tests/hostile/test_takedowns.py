"""A takedown is whole: one transaction, every place that the picture went to, and no fault undoes
it."""

from __future__ import annotations

import asyncio
import base64
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from samples.images import texture
from servers.gateway import Service, running
from sqlalchemy import select

from calotype.serving.api.background.tasks import Sweeper
from calotype.serving.api.review import removal
from calotype.serving.core.decision import NEWEST_TAKEDOWN
from calotype.serving.core.errors import Conflict, StorageFailed
from calotype.serving.database.connection import reading
from calotype.serving.database.review import cases as review_cases
from calotype.serving.database.review import takedowns
from calotype.serving.database.schema.training_tables import metadata
from calotype.serving.images.encode import encode_image
from calotype.serving.images.sealing import seal
from calotype.serving.jobs.endings import drawn_ending
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import FileRecord, JobRecord
from calotype.serving.testing.in_memory import decision, drawn_result

TAKEDOWNS, CASES = "/v1/moderation/takedowns", "/v1/moderation/cases"
LINE = {"prompt": "a fox", "seed": 3, "response_format": "b64_json"}


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Service]:
    with running(tmp_path) as service:
        yield service


@pytest.fixture
def reviewer(service: Service) -> Any:
    return service.http(service.database.api_keys.create(team="safety", scopes=("moderation",))[0])


def asset_of(job: JobRecord) -> str:
    assert job.output is not None
    return str(job.output["images"][0]["asset_id"])


def draw(service: Service, **body: Any) -> JobRecord:
    answer = service.generate(**{"prompt": "a fox", "seed": 3} | body)
    assert answer.status_code == 200, answer.text
    return service.jobs()[0]


def order_for(*asset_ids: str, sha256s: tuple[str, ...] = ()) -> takedowns.TakedownOrder:
    nothing = takedowns.Fingerprint(None, None)
    category = takedowns.Category.HARASSMENT
    return takedowns.TakedownOrder(nothing, category, "r", asset_ids, sha256s)


def take_down(reviewer: Any, asset_id: str, **more: Any) -> dict[str, Any]:
    body = {"asset_id": asset_id, "category": "harassment", "reason": "That is me."} | more
    answer = reviewer.post(TAKEDOWNS, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def batch_output(service: Service, kind: str = "generations", **more: Any) -> str:
    """The file of a batch that drew one picture."""
    http, url = service.http(), f"/v1/images/{kind}"
    line = {"custom_id": "a", "url": url, "body": LINE | more}
    given = {"file": ("b.jsonl", json.dumps(line).encode())}
    file = http.post("/v1/files", files=given, data={"purpose": "batch"}).json()
    asked = {"endpoint": url, "completion_window": "24h"}
    batch = http.post("/v1/batches", json={"input_file_id": file["id"], **asked}).json()
    end = time.monotonic() + 600
    while batch["status"] != "completed":
        assert time.monotonic() < end, batch
        time.sleep(0.02)
        batch = http.get(f"/v1/batches/{batch['id']}").json()
    return str(batch["output_file_id"])


def sweep(service: Service) -> None:
    asyncio.run(Sweeper(service.gateway()).sweep())


def test_it_finds_every_place_that_the_picture_went_to(service: Service, reviewer: Any) -> None:
    http = service.http()
    output = batch_output(service)
    job = service.jobs()[0]
    asset_id = asset_of(job)
    repeat = {"idempotency-key": "k"}
    streamed = LINE | {"stream": True, "partial_images": 1, "seed": 4}
    http.post("/v1/images/generations", json=streamed, headers=repeat)
    watched = service.jobs()[0]
    picture = service.blobs.get(service.database.files.get_asset(asset_id).blob_key)
    copy = http.post("/v1/files", files={"file": ("c.png", picture)}, data={"purpose": "vision"})
    edited = http.post(
        "/v1/images/edits",
        json={"prompt": "the same in blue", "images": [{"file_id": copy.json()["id"]}]},
    )
    assert edited.status_code == 200, edited.text
    variant = asset_of(service.jobs()[0])
    link = http.get(f"/v1/assets/{asset_id}").json()["url"]
    places = [link, f"/v1/files/{output}/content", f"/v1/files/{copy.json()['id']}/content"]
    assert [http.get(place).status_code for place in places] == [200] * 3

    along = {"assets": 1, "files": 3, "held": 0, "previews": 0}
    tried = take_down(reviewer, asset_id, dry_run=True)
    assert (tried["id"], tried["also"]) == (None, along), "a reviewer is told before"
    assert [http.get(place).status_code for place in places] == [200] * 3
    answer = take_down(reviewer, asset_id)
    assert answer["also"] == along
    assert [http.get(place).status_code for place in places] == [404] * 3
    assert http.get(f"/v1/assets/{variant}").status_code == 404, "it was drawn from the picture"

    assert service.database.intermediates.list_previews(watched.id)
    assert take_down(reviewer, asset_of(watched))["also"]["previews"] == 1
    assert '"b64_json":' not in http.get(f"/v1/jobs/{watched.id}/events").text
    again = http.post("/v1/images/generations", json=streamed, headers=repeat)
    assert base64.b64encode(picture)[:64].decode() not in again.text
    assert again.status_code == 404 or '"error"' in again.text
    assert not {key for key, data in service.blobs.blobs.items() if data == picture}


def test_the_output_of_a_batch_is_found_as_long_as_it_is_kept(
    service: Service, reviewer: Any
) -> None:
    """The pictures in it are over after a day, and were deleted by their team; it lives longer."""
    http, output = service.http(), batch_output(service)
    asset = service.database.files.get_asset(asset_of(service.jobs()[0]))
    assert asset is not None
    service.blobs.put(asset.blob_key, encode_image(texture(11, 256), "png", None))
    assert http.delete(f"/v1/assets/{asset.id}").status_code == 200
    assert http.delete(f"/v1/assets/{asset.id}").status_code == 404
    service.clock.advance(hours=72)
    sweep(service)
    assert http.get(f"/v1/assets/{asset.id}").status_code == 410
    assert http.get(f"/v1/files/{output}/content").status_code == 200
    found = encode_image(texture(11, 256), "jpeg", None)
    body = {"image": base64.b64encode(found).decode(), "category": "harassment", "reason": "r"}
    answer = reviewer.post(TAKEDOWNS, json=body).json()
    assert (answer["match_count"], answer["also"]["files"]) == (1, 1)
    assert http.get(f"/v1/files/{output}/content").status_code == 404


def test_nothing_holds_its_bytes_when_all_is_done(service: Service, reviewer: Any) -> None:
    """Also not as base64 in the lines of batches that are drawn from it, or in any table."""
    source = draw(service)
    key = service.database.files.get_asset(asset_of(source)).blob_key
    picture = service.blobs.get(key)
    text = base64.b64encode(picture).decode()
    batch_output(service, "edits", images=[{"image_url": f"data:image/png;base64,{text}"}])

    def holding() -> set[str]:
        found = {
            name
            for name, data in service.blobs.blobs.items()
            if picture in data or text.encode() in data
        }
        with reading(service.database.engine) as connection:
            for table in metadata.sorted_tables:
                if text in repr([tuple(row) for row in connection.execute(select(table))]):
                    found.add(table.name)
        return found

    assert len(holding()) == 4, "the picture, its copy for the job, the batch's file and its lines"
    take_down(reviewer, asset_of(source))
    assert holding() == set()


def test_a_fault_before_the_end_of_the_transaction_undoes_all_of_it(
    service: Service, reviewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of who did it belongs to what was done: neither is there without the other."""

    def full(*given: Any) -> None:
        raise StorageFailed("The disk is full.")

    asset_id = asset_of(draw(service))
    body = {"asset_id": asset_id, "category": "harassment", "reason": "r"}
    monkeypatch.setattr(takedowns, "append_action", full)
    assert reviewer.post(TAKEDOWNS, json=body).status_code >= 500
    assert service.database.files.get_asset(asset_id) is not None
    assert service.database.takedowns.list_takedowns() == []
    monkeypatch.undo()
    report = {"asset_id": asset_id, "reason": "That is me."}
    case = service.http().post("/v1/moderation/reports", json=report).json()
    reviewer.post(f"{CASES}/take")
    monkeypatch.setattr(review_cases, "append_action", full)
    decide = f"{CASES}/{case['id']}/decide"
    assert reviewer.post(decide, json={"verdict": "taken_down"}).status_code >= 500
    assert service.database.files.get_asset(asset_id) is not None
    assert service.database.takedowns.list_takedowns() == []
    assert service.database.cases.get_case(case["id"]).status == "open"
    monkeypatch.undo()
    assert reviewer.post(decide, json={"verdict": "taken_down"}).status_code == 200
    assert service.database.files.get_asset(asset_id) is None
    actions = [row["action"] for row in service.database.reviewer_audit.actions()]
    assert actions == ["takedown.made", "case.decided"]


def test_bytes_that_cannot_be_deleted_are_not_served_and_go_later(
    service: Service, reviewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = draw(service)
    asset_id = asset_of(job)
    url = service.http().get(f"/v1/assets/{asset_id}").json()["url"]
    other = draw(service, seed=9)
    key = service.database.files.get_asset(asset_id).blob_key
    delete, away = service.blobs.delete, {key}

    def refuse(name: str) -> None:
        if name in away:
            raise StorageFailed("The store is away.")
        delete(name)

    monkeypatch.setattr(service.blobs, "delete", refuse)
    answer = take_down(reviewer, asset_id)
    assert (answer["deleted"], answer["pending"]) == (0, 1)
    assert service.fetch(url).status_code == 404 and key in service.blobs.blobs
    # One file that cannot be deleted keeps no other from going.
    rest = service.database.files.get_asset(asset_of(other)).blob_key
    take_down(reviewer, asset_of(other))
    with pytest.raises(StorageFailed, match="1 files could not be deleted"):
        sweep(service)
    assert key in service.blobs.blobs and rest not in service.blobs.blobs
    away.clear()
    sweep(service)
    assert key not in service.blobs.blobs
    assert service.database.files.garbage(service.clock.time()) == []


def test_a_copy_that_is_stored_just_after_goes_with_the_next_sweep(
    service: Service, reviewer: Any
) -> None:
    """It was checked before the takedown, when nobody knew."""
    first, late = draw(service), draw(service, seed=9)
    files = service.database.files
    for job, kind in ((first, "png"), (late, "jpeg")):
        data = encode_image(texture(11, 256), kind, None)
        service.blobs.put(files.get_asset(asset_of(job)).blob_key, data)
    # Not looked at yet, as an asset that is written in the next moment.
    noted = service.database.image_index.unindexed_assets
    service.database.image_index.unindexed_assets = lambda limit=100: [  # type: ignore[method-assign]
        asset for asset in noted(limit) if asset.id != asset_of(late)
    ]
    assert take_down(reviewer, asset_of(first))["match_count"] == 1
    service.database.image_index.unindexed_assets = noted  # type: ignore[method-assign]
    assert files.get_asset(asset_of(late)) is not None
    sweep(service)
    assert files.get_asset(asset_of(late)) is None
    actions = [row["action"] for row in service.database.reviewer_audit.actions()]
    assert actions == ["takedown.made", "takedown.extended"]
    assert service.database.takedowns.unsettled()
    service.clock.advance(seconds=takedowns.SETTLE_SECONDS + 1)
    sweep(service)
    assert not service.database.takedowns.unsettled()


def running_edit(service: Service, source: JobRecord) -> JobRecord:
    """A job that a worker elsewhere draws from the picture of another job."""
    blob = service.database.files.get_asset(asset_of(source)).blob_key
    picture = base64.b64encode(service.blobs.get(blob)).decode()
    edit = {"prompt": "in blue", "images": [{"image_url": f"data:image/png;base64,{picture}"}]}
    service.backend.pause()
    made = service.http().post("/v1/jobs", json={"type": "image.edit", "input": edit})
    assert "id" in made.json(), made.text
    job_id, until = made.json()["id"], service.clock.time() + 600
    job = service.database.jobs.start_job(job_id, "elsewhere", until)
    assert job is not None
    return job


def test_a_job_that_is_drawn_from_it_ends_without_a_picture(
    service: Service, reviewer: Any
) -> None:
    source = draw(service)
    job = running_edit(service, source)
    take_down(reviewer, asset_of(source))
    ended = service.database.jobs.get_job(job.id)
    assert ended is not None and ended.status == "failed", "it was ended at once"
    assert (ended.error or {})["code"] == "picture_taken_down"
    service.backend.resume()


def test_a_result_from_a_taken_down_picture_is_refused_in_the_same_transaction(
    service: Service, reviewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the job could not be ended when the picture went."""
    source, database = draw(service), service.database
    job = running_edit(service, source)
    with monkeypatch.context() as patch:
        patch.setattr(removal, "end_jobs", lambda *given: None)
        take_down(reviewer, asset_of(source))
    result = drawn_result(Lease.from_job(job, 0.0))
    database.jobs.finish_job(job.id, drawn_ending(job, result))
    ended = database.jobs.get_job(job.id)
    assert ended is not None and ended.status == "failed" and not ended.output
    assert database.files.get_asset(result.images[0].asset_id) is None
    assert result.images[0].blob_key in database.files.garbage(0.0), "to be deleted at once"
    service.backend.resume()


def test_a_picture_that_was_checked_before_a_takedown_is_checked_again(service: Service) -> None:
    """Whatever comes between the safety stage's decision and the transaction that stores it."""
    other = draw(service, seed=9)
    known: list[int] = []

    def check(pixels: Any) -> dict[str, Any]:
        number, _ = takedowns.TakenDown(service.database.takedowns).numbered()
        if not known:
            service.database.takedowns.take_down(order_for(asset_of(other)), "key_1")
        known.append(number)
        return decision("output") | {NEWEST_TAKEDOWN: number}

    service.safety.image = check
    job = draw(service)
    assert job.status == "succeeded" and len(known) == 2 and known[0] < known[1]
    assert (job.attempts, job.fence) == (1, 3), "nothing that counts against it"


def test_a_held_copy_is_not_released(service: Service, reviewer: Any) -> None:
    """A copy with other bytes: held, then the picture is taken down, then somebody approves it."""
    files, held_images = service.database.files, service.database.held_images
    shown = draw(service)
    data = encode_image(texture(11, 256), "png", None)
    service.blobs.put(files.get_asset(asset_of(shown)).blob_key, data)
    service.safety.image = lambda pixels: (
        decision("output", blocked=["violence"]) | {"verdict": "REVIEW"}
    )
    told = service.generate(prompt="a dog").json()["error"]["moderation"]["held"][0]
    held = held_images.get_held(told["asset_id"])
    assert held is not None
    copy = encode_image(texture(11, 256), "jpeg", None)
    service.blobs.put(held.blob_key, seal(copy, held.seal, held.asset_id))
    name = take_down(reviewer, asset_of(shown))["id"]
    assert reviewer.post(f"{CASES}/take").status_code == 200
    decide = f"{CASES}/{told['case_id']}/decide"
    answer = reviewer.post(decide, json={"verdict": "approved"})
    assert answer.status_code == 409 and name in answer.json()["error"]["message"]
    assert files.get_asset(told["asset_id"]) is None
    assert reviewer.post(decide, json={"verdict": "rejected"}).status_code == 200


def test_a_file_of_a_batch_is_not_written_with_a_picture_that_went_meanwhile(
    service: Service, reviewer: Any
) -> None:
    job = draw(service)
    asset_id = asset_of(job)
    take_down(reviewer, asset_id)
    now = service.clock.time()
    file = FileRecord(
        *("file_1", job.team_id, "batch_output", "o.jsonl", "application/jsonl", 1, "0" * 64),
        *("k/1.jsonl", now, None),
    )
    with pytest.raises(Conflict, match="gone"):
        service.database.files.add_file(file, [asset_id])
    assert service.database.files.get_file("file_1", job.team_id) is None


def test_nobody_lifts_a_takedown_of_the_own_teams_picture(service: Service, reviewer: Any) -> None:
    name = take_down(reviewer, asset_of(draw(service)))["id"]
    own = service.http(service.database.api_keys.create(scopes=("moderation",))[0])
    answer = own.delete(f"{TAKEDOWNS}/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "own_team")
    assert [row.id for row in service.database.takedowns.list_takedowns()] == [name]
    assert reviewer.delete(f"{TAKEDOWNS}/{name}").status_code == 200


def test_held_copies_of_the_same_file_are_rejected(service: Service, reviewer: Any) -> None:
    service.safety.image = lambda pixels: (
        decision("output", blocked=["violence"]) | {"verdict": "REVIEW"}
    )
    told = service.generate(prompt="a dog").json()["error"]["moderation"]["held"][0]
    service.safety.image = lambda pixels: decision("output")
    held = service.database.held_images.get_held(told["asset_id"])
    assert held is not None
    order = order_for(sha256s=(held.sha256,))
    _, done = service.database.takedowns.take_down(order, "key_1")
    assert done.held == {told["asset_id"]}
    assert service.database.held_images.get_held(told["asset_id"]) is None
    assert service.database.cases.get_case(told["case_id"]).status == "rejected"

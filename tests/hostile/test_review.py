"""What people decide cannot be got round: previews, keys of held pictures, own cases, appeals."""

from __future__ import annotations

import asyncio
import inspect
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples.images import drawing, face
from servers.gateway import Service, running
from sqlalchemy import select

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier
from calotype.serving.core.decision import ImageContext
from calotype.serving.core.protocols import SafetyStage
from calotype.serving.core.request import GenerationRequest, ImageSize, Preview, SamplingParams
from calotype.serving.database.connection import reading
from calotype.serving.database.review import cases as review_cases
from calotype.serving.database.schema.training_tables import metadata
from calotype.serving.deployments.local import InProcessSafety
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.options import JobOptions
from calotype.serving.jobs.records import Checkpoint, PreviewRecord
from calotype.serving.testing.in_memory import MemoryBlobStore, ScriptedSafety, decision
from calotype.serving.worker.intermediates import Intermediates
from calotype.serving.worker.output_check import Sources

CASES, APPEALS = "/v1/moderation/cases", "/v1/moderation/appeals"
SIZE = ImageSize(64, 64)


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Service]:
    with running(tmp_path) as service:
        yield service


def client(service: Service, *scopes: str, team: str = "safety") -> Any:
    return service.http(service.database.api_keys.create(team=team, scopes=scopes)[0])


def hold(service: Service, *indices: int, verdict: str = "REVIEW") -> None:
    """The safety stage holds the pictures of these numbers, counted from now."""
    count = iter(range(1000))
    held = decision("output", blocked=["violence"]) | {"verdict": verdict}
    service.safety.image = lambda pixels: held if next(count) in indices else decision("output")


# -- previews ------------------------------------------------------------------------------------


class Shown:
    """What clients are shown of a job that is drawn."""

    def __init__(self) -> None:
        self.previews: list[PreviewRecord] = []

    async def checkpoint(self, checkpoint: Checkpoint) -> bool:
        return True

    async def preview(self, preview: PreviewRecord) -> bool:
        self.previews.append(preview)
        return True


def previews_shown(reference: Any, *, told: bool = True) -> int:
    """How many of one preview are shown of a request that is drawn from ``reference``."""
    suspicious = FixedImageClassifier({"sexual": 0.4})
    stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=[suspicious])
    file, shown = io.BytesIO(), Shown()
    Image.fromarray(reference).save(file, "PNG")
    request = GenerationRequest(
        *("r", "a portrait", SIZE, SIZE, SamplingParams(4, 4.0), 1),
        references=("f",),
        preview_every=1,
    )
    lease = Lease("j", 1, request, JobOptions("req_1"), "team", 0.0)

    async def run() -> None:
        left = Intermediates(lease, shown, InProcessSafety(stage), MemoryBlobStore())
        if told:
            left.draws_from(await Sources.of(request, {"f": file.getvalue()}))
        left.note(Preview("r", 0, 1, np.array(drawing(1, 64))))
        await left.finish()

    asyncio.run(run())
    return len(shown.previews)


def test_a_preview_is_checked_with_the_reference_pictures() -> None:
    assert previews_shown(drawing(1)) == 1
    assert previews_shown(face()) == 0
    assert previews_shown(drawing(1), told=False) == 0, "nobody knows yet what it is drawn from"


def test_the_context_of_an_image_is_not_optional() -> None:
    for stage in (SafetyStage, InProcessSafety, ScriptedSafety):
        given = inspect.signature(stage.check_image).parameters
        assert list(given) == ["self", "pixels", "context"], stage
        assert given["context"].default is inspect.Parameter.empty, stage
    given = inspect.signature(ImageContext).parameters
    assert all(part.default is inspect.Parameter.empty for part in given.values())


@pytest.mark.parametrize("verdict", ["REVIEW", "BLOCK", "BLUR"])
def test_previews_of_a_picture_that_is_not_shown_as_drawn_go_with_its_end(
    service: Service, verdict: str
) -> None:
    """Each preview may pass and the finished picture not: then nobody sees the preview either."""
    hold(service, 3, verdict=verdict)  # two previews, then the second of two pictures
    service.generate(prompt="a fox", n=2, stream=True, partial_images=1)
    (job,) = service.jobs()
    assert job.status == "succeeded" and len(service.safety.contexts) == 4
    assert {p.image_index for p in service.database.intermediates.list_previews(job.id)} == {0}


# -- keys of held pictures -----------------------------------------------------------------------


def stored_words(service: Service) -> dict[str, str]:
    """Table -> everything that stands in it."""
    with reading(service.database.engine) as connection:
        return {
            table.name: repr([tuple(row) for row in connection.execute(select(table))])
            for table in metadata.sorted_tables
        }


def test_each_held_picture_has_a_key_that_goes_with_it(service: Service) -> None:
    hold(service, 0, 1)
    told = service.generate(prompt="a dog", n=2).json()["error"]["moderation"]["held"]
    rows = [service.database.held_images.get_held(entry["asset_id"]) for entry in told]
    first, second = (row for row in rows if row is not None)
    assert first.seal != second.seal and first.seal not in repr(first)
    names = {first.seal: {"held_pictures"}, second.seal: {"held_pictures"}}
    for seal, wanted in names.items():
        assert {name for name, words in stored_words(service).items() if seal in words} == wanted
    reviewer = client(service, "moderation")
    case = reviewer.post(f"{CASES}/take").json()
    answer = reviewer.post(f"{CASES}/{case['id']}/decide", json={"verdict": "rejected"})
    assert answer.json()["status"] == "rejected"
    gone = first if case["asset_id"] == first.asset_id else second
    assert not [name for name, words in stored_words(service).items() if gone.seal in words]


# -- own cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scopes", [("images", "moderation"), ("admin",)])
def test_nobody_decides_over_pictures_of_the_own_team(
    service: Service, scopes: tuple[str, ...]
) -> None:
    hold(service, 0)
    told = service.generate(prompt="a dog").json()["error"]["moderation"]["held"][0]
    own = client(service, *scopes, team="default")
    case = f"{CASES}/{told['case_id']}"
    assert own.post(f"{CASES}/take").status_code == 204, "there is none for this key"
    for answer in (
        own.post(f"{case}/decide", json={"verdict": "approved"}),
        own.get(f"{case}/picture"),
        own.get(f"{case}/picture", params={"reveal": True}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "own_team")
    assert service.http().get(f"/v1/assets/{told['asset_id']}").status_code == 404
    assert list(service.database.reviewer_audit.actions()) == []
    other = client(service, "moderation")
    assert other.post(f"{CASES}/take").json()["id"] == told["case_id"]
    assert other.post(f"{case}/decide", json={"verdict": "approved"}).status_code == 200


def test_a_report_is_not_decided_by_the_team_that_drew_the_picture(service: Service) -> None:
    drawn = service.generate(prompt="a red circle", response_format="url").json()
    asset_id = drawn["data"][0]["url"].split("/assets/")[1].split("/")[0]
    report = {"asset_id": asset_id, "reason": "That is me."}
    case = client(service, "images", team="others").post("/v1/moderation/reports", json=report)
    own = client(service, "moderation", team="default")
    assert own.post(f"{CASES}/take").status_code == 204
    url = f"{CASES}/{case.json()['id']}/decide"
    assert own.post(url, json={"verdict": "dismissed"}).json()["error"]["code"] == "own_team"


# -- appeals -------------------------------------------------------------------------------------


def refused(service: Service, number: int) -> str:
    service.safety.prompt = lambda text: (
        decision("input", blocked=["sexual"]) | {"id": f"dec_{number:024x}"}
    )
    error = service.generate(prompt=f"forbidden {number}").json()["error"]
    return str(error["moderation"]["decision_id"])


def test_an_appeal_is_about_a_decision_that_refused_something_of_the_own_team(
    service: Service,
) -> None:
    mine, stranger = service.http(), client(service, "images", team="others")
    real = refused(service, 1)
    for http, decision_id in [(mine, f"dec_{n:024x}") for n in range(2, 8)] + [(stranger, real)]:
        answer = http.post(APPEALS, json={"decision_id": decision_id, "reason": "r"})
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["param"] == "decision_id"
    service.safety.prompt = lambda text: decision("input") | {"id": f"dec_{9:024x}"}
    assert service.generate(prompt="a fox").status_code == 200
    allowed = {"decision_id": f"dec_{9:024x}", "reason": "r"}
    assert mine.post(APPEALS, json=allowed).status_code == 404, "it refused nothing"
    assert mine.post(APPEALS, json={"decision_id": real, "reason": "r"}).status_code == 201
    assert len(service.database.cases.list_cases()) == 1


def test_a_team_has_a_bounded_number_of_open_appeals(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review_cases, "MOST_OPEN", 2)
    http = service.http()
    asked = [{"decision_id": refused(service, n), "reason": "r"} for n in range(3)]
    answers = [http.post(APPEALS, json=body) for body in asked]
    assert [answer.status_code for answer in answers] == [201, 201, 429]
    assert answers[2].json()["error"]["code"] == "too_many_open_cases"
    assert http.post(APPEALS, json=asked[0]).status_code == 201, "the case that it has already"
    reviewer = client(service, "moderation")
    case = reviewer.post(f"{CASES}/take").json()
    reviewer.post(f"{CASES}/{case['id']}/decide", json={"verdict": "upheld"})
    assert http.post(APPEALS, json=asked[2]).status_code == 201

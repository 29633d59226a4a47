"""A gateway whose model app comes and goes, and whose configuration changes under it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import hashlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from calotype.serving.cluster.stand_in import StandIn
from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL
from calotype.serving.core.decision import CheckScope
from calotype.serving.core.errors import Overloaded

pytestmark = pytest.mark.slow

House = Any
"""conftest.House"""
MODEL = BUILT_IN_MODEL.model_dump(mode="json", by_alias=True, exclude_none=True)
STRIPES = BUILT_IN_ADAPTER.model_dump(mode="json", by_alias=True, exclude_none=True)


# -- a model app that comes and goes -------------------------------------------------------------


def test_jobs_are_accepted_without_a_model_app_and_drawn_when_it_comes(house: House) -> None:
    accepted = [house.submit(seed=seed) for seed in range(3)]
    assert [answer.status_code for answer in accepted] == [202] * 3
    paths = [f"/v1/jobs/{answer.json()['id']}" for answer in accepted]
    assert {house.get(path).json()["status"] for path in paths} == {"queued"}
    with house.model_app():
        house.wait_for(
            lambda: {house.get(path).json()["status"] for path in paths} == {"succeeded"},
            "all of them are drawn",
        )


def test_a_call_that_waits_is_answered_when_the_model_app_comes(house: House) -> None:
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(house.generate(deadline_seconds=25)))
    waiting.start()
    house.wait_for(lambda: house.get("/v1/jobs").json()["data"], "the job is there")
    with house.model_app():
        waiting.join(600)
    assert answers[0].status_code == 200, answers[0].text


def test_a_call_that_waited_in_vain_says_so_and_leaves_no_job_behind(house: House) -> None:
    answer = house.generate(deadline_seconds=0.5)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "generation_timeout"
    (job,) = house.get("/v1/jobs").json()["data"]
    assert (job["status"], job["error"]["code"]) == ("failed", "generation_timeout")


@contextlib.contextmanager
def expected_in(house: House, seconds: float) -> Iterator[None]:
    """The model app is being started again; another one answers for it."""
    problem = Overloaded("Away.", retry_after=seconds, details={"estimated_seconds": seconds})
    loop = asyncio.new_event_loop()
    turning = threading.Thread(target=loop.run_forever)
    turning.start()
    with socket.create_server(("127.0.0.1", house.app_port)) as listener:
        stand_in = StandIn(listener, lambda: problem)
        asyncio.run_coroutine_threadsafe(stand_in.open(), loop).result(600)
        try:
            yield
        finally:
            loop.call_soon_threadsafe(stand_in.close)
            loop.call_soon_threadsafe(loop.stop)
            turning.join()
            loop.close()


def test_a_deadline_before_the_model_is_back_is_refused_with_the_estimate(house: House) -> None:
    with expected_in(house, 25.0):
        refused = house.generate(deadline_seconds=5)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "25"
        error = refused.json()["error"]
        assert (error["code"], error["estimated_seconds"]) == ("model_not_ready", 25)
        assert house.get("/v1/jobs").json()["data"] == [], "nothing was made of it"
        accepted = house.submit()
        assert accepted.status_code == 202
    with house.model_app():
        path = f"/v1/jobs/{accepted.json()['id']}"
        house.wait_for(lambda: house.get(path).json()["status"] == "succeeded", "it is drawn")


def test_a_job_is_canceled_without_the_model_app(house: House) -> None:
    job = house.submit().json()
    with house.http() as client:
        assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["status"] == "canceled"
    with house.model_app():
        assert house.generate().status_code == 200
    assert house.get(f"/v1/jobs/{job['id']}").json()["status"] == "canceled"


def test_ready_means_that_jobs_can_be_accepted_and_models_tell_how_they_are(house: House) -> None:
    absent = house.get("/readyz")
    assert absent.status_code == 200
    assert not absent.json()["models"][0]["ready"]
    assert "cannot be reached" in house.get("/v1/models/dall-e-3").json()["status"]["message"]
    with house.model_app():
        house.wait_for(
            lambda: house.get("/v1/models").json()["data"][0]["status"]["ready"], "it is seen"
        )
        status = house.get("/v1/models").json()["data"][0]["status"]
    assert (status["replicas"], status["adapters"]) == (1, {"stripes": "ready"})


def test_official_clients_draw_and_are_refused_through_a_model_app(house: House) -> None:
    with house.model_app():
        sdk = openai.OpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0)
        drawn = sdk.images.generate(model="dall-e-3", prompt="a fox", response_format="b64_json")
        assert drawn.data is not None
        image = base64.b64decode(drawn.data[0].b64_json or "")
        assert Image.open(io.BytesIO(image)).size == (128, 128)
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.images.generate(model="dall-e-3", prompt="something forbidden")
    assert refused.value.code == "moderation_blocked"


def test_texts_and_pictures_are_checked_by_the_model_app(house: House) -> None:
    def part(colour: int) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), colour, np.uint8)).save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    def flagged(parts: Any) -> Any:
        with house.http() as client:
            answer = client.post("/v1/moderations", json={"input": parts})
        assert answer.status_code == 200, answer.text
        return [result["flagged"] for result in answer.json()["results"]]

    with house.http() as client:
        assert client.post("/v1/moderations", json={"input": "x"}).status_code == 503
    with house.model_app():
        assert flagged(["a fox", "something forbidden"]) == [False, True]
        assert flagged([part(254)]) == [False]
        assert flagged([{"type": "text", "text": "a fox"}, part(255)]) == [True]


# -- a configuration that changes ----------------------------------------------------------------


def test_a_changed_file_is_served_within_seconds_and_no_request_is_dropped(house: House) -> None:
    answers: list[int] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            answers.append(house.generate(seed=len(answers)).status_code)

    other = copy.deepcopy(MODEL)
    other["metadata"]["name"], other["spec"]["aliases"] = "second", []
    with house.model_app():
        asking = threading.Thread(target=keep_asking)
        asking.start()
        url = f"http://127.0.0.1:{house.app_port}"
        for models in ([MODEL, other], [MODEL], [MODEL, other]):
            entries = [{"manifest": manifest, "url": url} for manifest in models]
            house.configure(house.document(models=entries))
            wanted = [manifest["metadata"]["name"] for manifest in models]
            house.wait_for(
                lambda wanted=wanted: (
                    [model["id"] for model in house.get("/v1/models").json()["data"]] == wanted
                ),
                "the file is served",
            )
        done.set()
        asking.join(600)
    assert set(answers) == {200}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        (
            {"models": [{"manifest": {"kind": "ImageModel"}, "url": "http://a"}]},
            "models.0.manifest",
        ),
        ({"models": [{"manifest": MODEL, "url": "shapes:8000"}]}, "models.0.url"),
        ({"models": [{"manifest": MODEL, "url": None}] * 2}, "Two ImageModels"),
        ({"teams": [{"name": "shoes", "keyHashes": ["secret"]}]}, "keyHashes"),
    ],
)
def test_what_cannot_be_used_changes_nothing_and_is_told_once(
    house: House, document: Any, says: str
) -> None:
    house.configure(document)
    house.wait_for(lambda: any(says in sentence for sentence in house.said), "it is told")
    assert [model["id"] for model in house.get("/v1/models").json()["data"]] == ["shapes"]
    house.config.unlink()
    house.wait_for(lambda: "cannot be read" in house.said[-1], "the missing file is told")
    house.configure(house.document(adapters=[]))
    house.wait_for(lambda: "is used" in house.said[-1], "a good one is taken again")
    assert house.get("/v1/models").json()["data"][0]["adapters"] == []
    assert sum(says in sentence for sentence in house.said) == 1


def test_an_empty_file_offers_nothing_and_is_no_fault(house: House) -> None:
    for content in ("", "{}"):
        house.configure(house.document())
        house.wait_for(lambda: house.get("/v1/models").json()["data"], "the model is offered")
        house.configure(content)
        house.wait_for(lambda: not house.get("/v1/models").json()["data"], "nothing is offered")
        assert house.get("/readyz").status_code == 200
        assert house.generate().json()["error"]["code"] == "model_not_found"
    assert not any("not used" in sentence for sentence in house.said)


def test_a_symbolic_link_that_is_switched_is_followed(house: House) -> None:
    """As the kubelet updates a ConfigMap."""
    for number, adapters in enumerate(([STRIPES], [])):
        folder = house.folder / f"..{number}"
        folder.mkdir()
        (folder / "gateway.json").write_text(json.dumps(house.document(adapters=adapters)))
        link = house.folder / "..fresh"
        link.symlink_to(folder / "gateway.json")
        link.replace(house.config)
        house.wait_for(
            lambda adapters=adapters: (
                len(house.get("/v1/models").json()["data"][0]["adapters"]) == len(adapters)
            ),
            "the link is followed",
        )


# -- teams ---------------------------------------------------------------------------------------


def team(name: str, *keys: str, **more: Any) -> dict[str, Any]:
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    return {"name": name, "namespace": "shop", "keyHashes": hashes, **more}


def test_a_listed_key_is_its_team_until_it_is_listed_no_more(house: House) -> None:
    def status(key: str) -> int:
        return house.get("/v1/models", key).status_code

    assert status("ct_live_shoes") == 401
    house.configure(house.document(teams=[team("shoes", "ct_live_shoes")]))
    house.wait_for(lambda: status("ct_live_shoes") == 200, "the key works")
    with house.model_app():
        assert house.generate("ct_live_shoes").status_code == 200
    assert len(house.get("/v1/jobs", "ct_live_shoes").json()["data"]) == 1
    assert house.get("/v1/jobs").json()["data"] == [], "the job is the team's alone"
    house.configure(house.document(teams=[team("shoes", "ct_live_rotated")]))
    house.wait_for(lambda: status("ct_live_rotated") == 200, "the new key works")
    assert status("ct_live_shoes") == 401
    house.configure(house.document(teams=[]))
    house.wait_for(lambda: status("ct_live_rotated") == 401, "the team is gone")
    house.configure(house.document(teams=[team("shoes", "ct_live_shoes")]))
    house.wait_for(lambda: status("ct_live_shoes") == 200, "it is back")
    assert status(house.key) == 200, "keys that were made by hand are not touched"


def test_an_adapter_is_open_to_the_teams_that_it_names(house: House) -> None:
    stripes = copy.deepcopy(STRIPES)
    stripes["spec"]["access"] = {"teams": ["shoes"]}
    teams = [team("shoes", "ct_live_shoes"), team("hats", "ct_live_hats")]
    house.configure(house.document(adapters=[stripes], teams=teams))
    house.wait_for(lambda: house.get("/v1/models", "ct_live_hats").status_code == 200, "known")

    def seen(key: str) -> list[str]:
        adapters = house.get("/v1/models/shapes", key).json()["adapters"]
        return [adapter["id"] for adapter in adapters]

    assert (seen("ct_live_shoes"), seen("ct_live_hats")) == (["stripes"], [])
    with house.model_app():
        assert house.generate("ct_live_shoes", loras=[{"id": "stripes"}]).status_code == 200
        refused = house.generate("ct_live_hats", loras=[{"id": "stripes"}])
        assert house.generate("ct_live_hats").status_code == 200
    assert refused.status_code == 404
    assert "that is open to your team" in refused.json()["error"]["message"]
    assert len(house.get("/v1/jobs", "ct_live_hats").json()["data"]) == 1


def test_a_team_draws_with_its_models_only_and_within_its_quotas(house: House) -> None:
    teams = [
        team("shoes", "ct_live_shoes", models=["another"]),
        team("hats", "ct_live_hats", quotas={"requestsPerMinute": 1}),
    ]
    house.configure(house.document(teams=teams))
    house.wait_for(lambda: house.get("/v1/models", "ct_live_hats").status_code == 200, "known")
    refused = house.generate("ct_live_shoes")
    assert refused.status_code == 404
    assert "no model" in refused.json()["error"]["message"]
    with house.model_app():
        assert [house.generate("ct_live_hats").status_code for _ in range(2)] == [200, 429]
    house.configure(house.document(teams=[team("shoes", "ct_live_shoes")]))
    house.wait_for(
        lambda: house.generate("ct_live_shoes", deadline_seconds=0.2).status_code == 504,
        "every model is allowed again",
    )


def test_a_teams_policy_reaches_the_model_app_and_a_refused_team_draws_nothing(
    house: House,
) -> None:
    checked = team("shoes", "ct_live_shoes", moderationPolicy="kids")
    house.configure(house.document(teams=[checked]))
    house.wait_for(lambda: house.get("/v1/models", "ct_live_shoes").status_code == 200, "known")
    with house.model_app() as backend:
        scopes = backend.safety.scopes  # type: ignore[attr-defined]
        assert house.generate("ct_live_shoes").status_code == 200
        with house.http("ct_live_shoes") as client:
            assert client.post("/v1/moderations", json={"input": "a fox"}).status_code == 200
        kids = CheckScope(policies=("kids",))
        assert scopes == [kids] * 3, "prompt, picture, and what was only asked"
        assert house.generate().status_code == 200
        assert set(scopes[3:]) <= {None, CheckScope()}
        elsewhere = {"moderationPolicy": "kids", "models": ["another"]}
        house.configure(house.document(teams=[team("shoes", "ct_live_shoes", **elsewhere)]))

        def asked() -> int:
            with house.http("ct_live_shoes") as client:
                return client.post("/v1/moderations", json={"input": "a fox"}).status_code

        house.wait_for(lambda: asked() == 503, "a model that knows its policy is not there")
        refused = team("shoes", "ct_live_shoes", refusal="ModerationPolicy kids is laxer.")
        house.configure(house.document(teams=[refused]))
        house.wait_for(
            lambda: "ModerationPolicy kids is laxer." in house.generate("ct_live_shoes").text,
            "it is refused, with the reason",
        )
        assert house.generate("ct_live_shoes").status_code == 403
        assert house.get("/v1/jobs", "ct_live_shoes").status_code == 200, "what it has it may read"
        house.configure(house.document(teams=[team("shoes", "ct_live_shoes")]))
        house.wait_for(lambda: house.generate("ct_live_shoes").status_code == 200, "it may again")
    assert not scopes[-1] or not scopes[-1].policies, "its policy is gone with the reference"

"""Models, moderations, assets, jobs and the operators' routes."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import httpx
import openai
import pytest
from PIL import Image

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL, ImageModel
from calotype.serving.config.sources import ModelSource
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.testing.in_memory import decision


def change_query(url: str, **changes: str) -> str:
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query)) | changes
    return urlunsplit(parts._replace(query=urlencode(query)))


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


# -- models ------------------------------------------------------------------------------------


def test_a_model_says_where_its_weights_come_from(
    start_service: Callable[..., Any], quick: Callable[..., Any]
) -> None:
    service = start_service(settings=quick())
    own = service.http().get("/v1/models/shapes").json()
    assert own["weights"]["source"] == "builtIn" and own["weights"]["name"] == "shapes"
    assert own["weights"]["digest"].startswith("sha256:") and own["weights"]["pinned"]
    assert own["shutdown_date"] is None
    repo = "black-forest-labs/FLUX.2-dev"
    for source, weights in (
        ({"hugging_face": {"repo": repo}}, ("huggingFace", repo, None, False)),
        (
            {"hugging_face": {"repo": repo, "revision": "a" * 40}},
            ("huggingFace", repo, "a" * 40, True),
        ),
        ({"path": "/srv/secret/flux"}, ("path", None, None, False)),
        ({"s3": {"uri": "s3://secret/flux/"}}, ("s3", None, None, False)),
    ):
        spec = BUILT_IN_MODEL.spec.model_copy(update={"source": ModelSource(**source)})
        service.catalog.replace([BUILT_IN_MODEL.model_copy(update={"spec": spec})], [])
        told = service.http().get("/v1/models/shapes")
        assert tuple(told.json()["weights"].values()) == weights
        assert "secret" not in told.text


def test_models_are_listed_and_found_by_alias(shared_service: Any) -> None:
    client = shared_service.sdk()
    listed = client.models.list().data
    assert [model.id for model in listed] == ["shapes"]
    assert listed[0].owned_by == "calotype"
    assert client.models.retrieve("dall-e-3").id == "dall-e-3"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such")
    assert caught.value.code == "model_not_found"


def test_a_changed_manifest_counts_at_once(service: Any) -> None:
    other = BUILT_IN_MODEL.model_dump(by_alias=True)
    other["metadata"]["name"] = "other"
    service.catalog.replace([ImageModel.model_validate(other)], [])
    assert service.generate(prompt="a dog", model="shapes").status_code == 404
    assert service.generate(prompt="a dog", model="other").status_code == 200
    assert service.generate(prompt="a dog", loras=[{"id": "stripes"}]).status_code == 404
    with pytest.raises(InvalidRequest, match="belongs to"):
        service.catalog.replace([ImageModel.model_validate(other), BUILT_IN_MODEL])
    assert service.generate(prompt="a dog", model="other").status_code == 200
    service.catalog.replace([BUILT_IN_MODEL], [BUILT_IN_ADAPTER])
    assert service.generate(prompt="a dog", loras=[{"id": "stripes"}]).status_code == 200
    service.catalog.replace([])
    assert service.generate(prompt="a dog").json()["error"]["code"] == "model_not_found"


# -- moderations -------------------------------------------------------------------------------


def test_texts_are_checked_one_result_each(shared_service: Any) -> None:
    answer = shared_service.sdk().moderations.create(input=["a dog", "something forbidden"])
    assert answer.id.startswith("modr-")
    assert [result.flagged for result in answer.results] == [False, True]
    assert answer.results[1].categories.sexual
    assert answer.results[1].category_scores.sexual == 0.99
    assert not answer.results[1].categories.hate


def test_parts_make_one_result(shared_service: Any) -> None:
    shared_service.safety.image = lambda pixels: decision(
        "output", blocked=["violence"] if pixels.shape == (8, 16, 3) else []
    )
    answer = shared_service.sdk().moderations.create(
        model="omni-moderation-latest",
        input=[
            {"type": "text", "text": "a dog"},
            {"type": "image_url", "image_url": {"url": data_url(Image.new("RGBA", (16, 8)))}},
        ],
    )
    [result] = answer.results
    assert result.flagged and result.categories.violence
    assert result.category_applied_input_types.violence == ["text", "image"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": 3}, "invalid_type", "input"),
        ({"input": []}, "invalid_type", "input"),
        ({"input": ["a"] * 65}, "invalid_value", "input"),
        ({"input": ["a", 1]}, "invalid_value", "input[0]"),
        ({"input": [{"type": "text"}]}, "invalid_type", "input[0].text"),
        ({"input": "x" * 100_001}, "invalid_value", "input"),
        ({"input": "x", "model": 1}, "invalid_type", "model"),
        ({"inputs": "x"}, "unknown_parameter", "inputs"),
    ],
)
def test_a_bad_moderation_request_is_named(
    shared_service: Any, body: dict[str, Any], code: str, param: str
) -> None:
    answer = shared_service.http().post("/v1/moderations", json=body)
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,****",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,",
        None,
    ],
)
def test_a_picture_that_cannot_be_read_is_a_400_and_nothing_is_fetched(
    shared_service: Any, url: Any
) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    answer = shared_service.http().post("/v1/moderations", json={"input": [part]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_image"


def test_a_picture_bomb_is_refused(shared_service: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(Image.new("1", (7_500, 7_500)))}}
    answer = shared_service.http().post("/v1/moderations", json={"input": [part]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_image"


def test_moderation_without_classifiers_is_a_503(service: Any) -> None:
    service.safety.prompt = lambda text: decision(unavailable=True)
    answer = service.http().post("/v1/moderations", json={"input": "x"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "moderation_unavailable"


# -- assets ------------------------------------------------------------------------------------


def test_a_signed_address_gives_the_picture_without_a_key(service: Any) -> None:
    answer = service.sdk().images.generate(
        prompt="a dog", response_format="url", output_format="webp", extra_body={"seed": 3}
    )
    url = answer.data[0].url
    assert answer.data[0].b64_json is None
    assert url is not None
    got = service.fetch(url)
    assert got.status_code == 200
    assert got.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(got.content)).size == (128, 128)

    asset_id = urlsplit(url).path.split("/")[3]
    asset = service.http().get(f"/v1/assets/{asset_id}").json()
    assert asset["sha256"] == hashlib.sha256(got.content).hexdigest()
    assert (asset["width"], asset["seed"]) == (128, 3)
    redirect = service.http().get(f"/v1/assets/{asset_id}/content")
    assert redirect.status_code == 302
    assert service.fetch(redirect.headers["location"]).content == got.content


def test_a_changed_or_old_address_gives_nothing(service: Any) -> None:
    data = service.generate(prompt="a dog", n=2, response_format="url").json()["data"]
    url, other = data[0]["url"], data[1]["url"]
    query = dict(parse_qsl(urlsplit(url).query))
    for bad in (
        change_query(url, expires=str(int(query["expires"]) + 1)),
        change_query(url, expires="9" * 40),
        change_query(url, expires="soon"),
        change_query(url, signature="0" * 64),
        change_query(url, signature="ü"),
        change_query(other, signature=query["signature"]),
    ):
        assert service.fetch(bad).status_code == 404, bad
    without = urlunsplit(urlsplit(url)._replace(query=""))
    assert service.fetch(without).status_code == 401


def test_addresses_and_assets_expire(start_service: Any) -> None:
    service = start_service()
    url = service.generate(prompt="a dog", response_format="url").json()["data"][0]["url"]
    asset_id = urlsplit(url).path.split("/")[3]
    service.clock.advance(hours=2)
    assert service.fetch(url).status_code == 410
    assert service.fetch(url).json()["error"]["code"] == "expired"
    assert service.http().get(f"/v1/assets/{asset_id}").status_code == 200
    service.clock.advance(hours=23)
    assert service.http().get(f"/v1/assets/{asset_id}").status_code == 410


def test_another_teams_things_are_not_there(service: Any) -> None:
    job_id = service.generate(prompt="a dog", response_format="url").json()["job_id"]
    job = service.http().get(f"/v1/jobs/{job_id}").json()
    asset_id = job["output"]["images"][0]["asset_id"]
    stranger, _ = service.database.api_keys.create(team="strangers")
    client = service.http(stranger)
    for path in (
        f"/v1/jobs/{job_id}",
        f"/v1/assets/{asset_id}",
        f"/v1/assets/{asset_id}/content",
        "/v1/jobs/job_none",
        "/v1/assets/asset_none",
    ):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "not_found"
    assert client.post(f"/v1/jobs/{job_id}/cancel").status_code == 404
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_key_may_do_what_its_scopes_say(service: Any) -> None:
    plain, _ = service.database.api_keys.create(scopes=["images"])
    client = service.http(plain)
    assert client.get("/v1/models").status_code == 200
    answer = client.get("/v1/jobs")
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"
    assert answer.json()["error"]["code"] == "insufficient_permissions"


# -- jobs --------------------------------------------------------------------------------------


def test_a_job_is_accepted_and_asked_for_later(service: Any) -> None:
    service.backend.pause()
    client = service.http()
    body = {"model": "dall-e-3", "input": {"prompt": "a dog", "seed": 4}, "metadata": {"t": "1"}}
    made = client.post("/v1/jobs", json=body)
    assert made.status_code == 202
    job = made.json()
    assert made.headers["location"] == job["urls"]["get"]
    assert (job["object"], job["status"], job["model"]) == ("image.job", "queued", "shapes")
    assert job["metadata"] == {"t": "1"}
    service.backend.resume()
    again = client.post("/v1/jobs", json=body, headers={"prefer": "wait=20"})
    assert again.status_code == 200
    assert again.json()["status"] == "succeeded"
    assert again.json()["progress"] == 100
    image = again.json()["output"]["images"][0]
    assert service.fetch(image["url"]).status_code == 200
    assert again.json()["moderation"]["input"][0]["verdict"] == "ALLOW"
    listed = client.get("/v1/jobs", params={"limit": 1}).json()
    assert (len(listed["data"]), listed["has_more"]) == (1, True)
    rest = client.get("/v1/jobs", params={"after": listed["last_id"]}).json()
    assert [found["id"] for found in rest["data"]] == [job["id"]]
    assert rest["has_more"] is False


def test_a_failed_job_says_why_as_the_synchronous_route_does(service: Any) -> None:
    body = {"input": {"prompt": "something forbidden"}}
    job = service.http().post("/v1/jobs", json=body, headers={"prefer": "wait=20"}).json()
    assert job["status"] == "failed"
    assert job["error"]["type"] == "image_generation_user_error"
    assert job["error"]["code"] == "moderation_blocked"
    assert job["error"]["moderation_details"]["categories"] == ["sexual"]
    assert "scores" not in str(job["moderation"])


def test_a_job_is_canceled_once_and_stays_so(service: Any) -> None:
    service.backend.pause()
    client = service.http()
    job_id = client.post("/v1/jobs", json={"input": {"prompt": "a dog"}}).json()["id"]
    for _ in range(2):
        answer = client.post(f"/v1/jobs/{job_id}/cancel")
        assert answer.status_code == 200
        assert answer.json()["status"] == "canceled"
        assert answer.json()["error"]["code"] == "canceled"
    service.backend.resume()
    assert service.generate(prompt="a dog").status_code == 200
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "canceled"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"status": "done"}, "status"),
        ({"created_after": "nan"}, "created_after"),
        ({"after": "job_none"}, "after"),
    ],
)
def test_a_bad_listing_is_named(shared_service: Any, query: dict[str, str], param: str) -> None:
    answer = shared_service.http().get("/v1/jobs", params=query)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_bad_job_is_named(shared_service: Any) -> None:
    client = shared_service.http()
    for body, param in [
        ({}, "prompt"),
        ({"input": {"promt": "x"}}, "promt"),
        ({"input": {"prompt": "x"}, "type": "video"}, "type"),
        ({"input": {"prompt": "x"}, "webhook": {"url": "https://127.0.0.1/x"}}, "webhook.url"),
        ({"input": {"prompt": "x"}, "webhook": {"url": "http://example.com"}}, "webhook.url"),
        ({"input": {"prompt": "x"}, "webhook": {"events": []}}, "webhook.url"),
        ({"input": {"prompt": "x", "stream": True}}, "stream"),
        ({"input": {"prompt": "x"}, "recipe": {"version": 1}}, "recipe"),
        ({"input": "x"}, "input"),
        ({"input": {"prompt": "x"}, "metadata": {"k": "v" * 513}}, "metadata.k"),
    ]:
        answer = client.post("/v1/jobs", json=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"] == param


# -- operators ---------------------------------------------------------------------------------


def test_operators_ask_without_a_key(service: Any) -> None:
    service.generate(prompt="a dog")
    client = httpx.Client(base_url=service.url, verify=False, timeout=600)
    service.clients.append(client)
    health = client.get("/healthz").json()
    assert health["status"] == "ok"
    assert set(health["loops"].values()) == {"ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["models"][0]["name"] == "shapes"
    text = client.get("/metrics").text
    assert 'calotype_jobs{model="shapes",status="succeeded"} 1.0' in text
    assert 'route="/v1/images/generations",status="200"' in text
    assert 'calotype_images_total{model="shapes"}' in text
    assert "a dog" not in text


def test_the_description_of_the_api_is_served(shared_service: Any) -> None:
    paths = shared_service.http().get("/openapi.json").json()["paths"]
    body = paths["/v1/images/generations"]["post"]["requestBody"]
    assert "prompt" in body["content"]["application/json"]["schema"]["properties"]


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_pages_about_the_api_ask_no_other_host(shared_service: Any, page: str) -> None:
    with shared_service.http() as client:
        told = client.get(page)
        named = re.findall(r"""(?:src|href)=["']([^"']+)""", told.text)
        assert told.status_code == 200 and named
        for address in named:
            assert address.startswith("/"), address
            assert client.get(address).status_code == 200

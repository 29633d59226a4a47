"""Base URLs as people type them, and pages of a browser that call the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

PAGE = "https://app.example"


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/models", "/v1/models/", "//v1//models", "/models/", "/v1/models/shapes/"],
)
def test_a_path_is_known_by_every_spelling(shared_service: Any, path: str) -> None:
    with shared_service.http() as client:
        answer = client.get(f"{shared_service.url}{path}")
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] in ("list", "model")


@pytest.mark.parametrize("base", ["", "/", "/v1/", "//v1"])
def test_a_client_draws_whatever_its_base_url_ends_with(shared_service: Any, base: str) -> None:
    with openai.OpenAI(
        base_url=f"{shared_service.url}{base}", api_key=shared_service.key, max_retries=0
    ) as sdk:
        drawn = sdk.images.generate(model="shapes", prompt="a red circle")
    assert drawn.data and drawn.data[0].b64_json


@pytest.mark.parametrize("path", ["/", "/v2/models", "/model", "/v1/v1/models", "/docs/x"])
def test_other_paths_stay_unknown(shared_service: Any, path: str) -> None:
    with shared_service.http() as client:
        answer = client.get(f"{shared_service.url}{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_head_tells_a_picture_without_sending_it(shared_service: Any) -> None:
    with shared_service.http() as client:
        drawn = client.post(
            "/v1/images/generations", json={"prompt": "a red circle", "response_format": "url"}
        )
        url = drawn.json()["data"][0]["url"]
        told, got = client.head(url), client.get(url)
    assert told.status_code == 200 and told.content == b""
    for name in ("content-length", "content-type", "etag"):
        assert told.headers[name] == got.headers[name]


def test_pages_may_call_only_where_they_are_named(
    start_service: Callable[..., Any], quick: Callable[..., Any], shared_service: Any
) -> None:
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with shared_service.http() as client:
        closed = client.options("/v1/images/generations", headers=asked)
    assert "access-control-allow-origin" not in closed.headers
    service = start_service(settings=quick(cors_origins=(PAGE,)))
    with service.http() as client:
        allowed = client.options("/v1/images/generations", headers=asked)
        other = client.options(
            "/v1/images/generations", headers=asked | {"origin": "https://evil.example"}
        )
        answer = client.get("/v1/models", headers={"origin": PAGE})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert other.headers.get("access-control-allow-origin") is None
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]

"""The bodies that Open WebUI sends, in its two dialects."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        {"model": "shapes", "n": 1, "size": "512x512", "response_format": "b64_json"},
        {"model": "dall-e-3", "n": 1, "response_format": "b64_json"},
        {"model": "gpt-image-1", "n": 1, "size": "auto"},
        {"model": "shapes", "n": 2, "size": "512x512", "response_format": "b64_json", "steps": 4},
    ],
    ids=["own model", "no size", "gpt-image", "free parameters"],
)
@pytest.mark.parametrize("query", [{}, {"api-version": "2025-04-01-preview"}], ids=["", "azure"])
def test_a_generation(contract: Any, body: dict[str, Any], query: dict[str, str]) -> None:
    answer = contract.http().post(
        "/v1/images/generations", params=query, json={"prompt": "a fox", **body}
    )
    assert answer.status_code == 200, answer.text
    images = answer.json()["data"]
    assert len(images) == body["n"]
    assert base64.b64decode(images[0]["b64_json"]).startswith(b"\x89PNG")


@pytest.mark.parametrize("names", [["image"], ["image[]", "image[]"]], ids=["one", "several"])
def test_an_edit(contract: Any, names: list[str]) -> None:
    fields = {
        "prompt": "a cat",
        "model": "shapes",
        "n": "1",
        "size": "512x512",
        "background": "auto",
        "response_format": "b64_json",
    }
    files = [(name, ("image.png", png(), "image/png")) for name in names]
    answer = contract.http().post("/v1/images/edits", data=fields, files=files)
    assert answer.status_code == 200, answer.text
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")


def test_a_refusal_has_a_status_that_it_shows(contract: Any) -> None:
    answer = contract.generate(prompt="something forbidden", model="shapes", n=1, size="512x512")
    assert answer.status_code == 400
    assert "safety system" in answer.json()["error"]["message"]

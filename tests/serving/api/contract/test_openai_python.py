"""OpenAI's SDK for Python, from the oldest of its second major version to the newest."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

CALLS = pathlib.Path(__file__).parent / "openai_calls.py"


@pytest.fixture
def images(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    given, mask = tmp_path / "given.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "red").save(given)
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    half.save(mask)
    return given, mask


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.0.0", "2.54.0", "3.54.0"])
def test_everything_that_product_teams_call(
    contract: Any,
    python_with: Callable[[str], pathlib.Path],
    outcome: Callable[..., Any],
    images: tuple[pathlib.Path, pathlib.Path],
    version: str,
) -> None:
    python = python_with(f"openai=={version}")
    found = outcome([python, CALLS, contract.url, contract.key, *images])
    assert found["version"] == version
    sync, asynchronous = found["sync"], found["async"]
    fox, other = sync["pictures"]
    assert fox != other
    assert sync["usage"] and sync["created"] > 1_700_000_000
    assert sync["headers"]["x-image-seeds"] == "7"
    assert sync["headers"]["openai-processing-ms"].isdigit()
    fetched = httpx.get(sync["url"], timeout=600)
    assert Image.open(io.BytesIO(fetched.content)).format == "PNG"
    assert len({*sync["edits"], sync["variation"], fox}) == 4
    assert "shapes" in sync["models"] and sync["model"]
    assert sync["flagged"] == [False]
    assert sync["file"] == {"listed": True, "same": True, "deleted": True}
    *partial, last = sync["stream"]
    assert [(p["type"], p["number"]) for p in partial] == [
        ("image_generation.partial_image", 0),
        ("image_generation.partial_image", 1),
    ]
    assert (last["type"], last["digest"]) == ("image_generation.completed", fox)
    assert last["usage"]
    partial, last = sync["edit_stream"]
    assert (partial["type"], last["type"]) == ("image_edit.partial_image", "image_edit.completed")
    assert last["digest"] == sync["edits"][0]
    assert [(r["class"], r["code"], r["param"]) for r in sync["refusals"]] == [
        ("BadRequestError", "moderation_blocked", None),
        ("BadRequestError", "invalid_value", "size"),
        ("NotFoundError", "model_not_found", "model"),
        ("AuthenticationError", "invalid_api_key", None),
        ("BadRequestError", "moderation_blocked", None),
        ("BadRequestError", "invalid_image", "image[0]"),
    ]
    assert all(r["request_id"] and r["message"] for r in sync["refusals"])
    assert asynchronous["pictures"] == [fox] * 3
    assert asynchronous["stream"][-1]["digest"] == fox
    assert asynchronous["models"] == sync["models"]

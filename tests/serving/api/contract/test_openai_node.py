"""OpenAI's SDK for Node."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

CALLS = pathlib.Path(__file__).parent / "openai_calls.mjs"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["6.0.0", "7.57.0"])
def test_everything_that_product_teams_call(
    contract: Any,
    node_with: Callable[[str], pathlib.Path],
    outcome: Callable[..., Any],
    tmp_path: pathlib.Path,
    version: str,
) -> None:
    given, mask = tmp_path / "given.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "red").save(given)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(mask)
    folder = node_with(f"openai@{version}")
    found = outcome(["node", CALLS, folder, contract.url, contract.key, given, mask])
    fox, other = found["pictures"]
    assert fox != other != found["edit"]
    assert found["usage"] > 0
    assert "shapes" in found["models"]
    assert [event["type"] for event in found["stream"]] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert found["stream"][-1]["digest"] == fox
    assert [event["type"] for event in found["editStream"]] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    assert [(r["class"], r["code"], r["param"]) for r in found["refusals"]] == [
        ("BadRequestError", "moderation_blocked", None),
        ("BadRequestError", "invalid_value", "size"),
        ("NotFoundError", "model_not_found", "model"),
        ("BadRequestError", "moderation_blocked", None),
    ]
    assert all(r["requestId"] for r in found["refusals"])

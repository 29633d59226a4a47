"""Edits of pictures of every size and proportion."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from samples.images import half_mask, plain_file

from calotype.serving.api.state.settings import FEATURES

EDITS = "/v1/images/edits"


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory, shared_running: Callable[..., Any]) -> Any:
    """A service whose workers can do everything."""
    with shared_running(tmp_path_factory.mktemp("able"), features=set(FEATURES)) as service:
        yield service


def edited(
    able: Any, image: tuple[int, int], *, masked: bool = True, **fields: str
) -> dict[str, Any]:
    files = {"image": plain_file(size=image)} | ({"mask": half_mask(image)} if masked else {})
    answer = able.http().post(EDITS, data={"prompt": "a cat"} | fields, files=files)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    drawn = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert f"{drawn.width}x{drawn.height}" == body["size"]
    return body


@pytest.mark.parametrize(
    ("image", "drawn"),
    [
        ((1920, 1080), "224x128"),
        ((800, 600), "176x128"),
        ((1024, 768), "176x128"),
        ((100, 130), "96x128"),
        ((64, 64), "64x64"),
    ],
)
def test_a_picture_of_any_proportions_is_edited_at_its_own_size(
    able: Any, image: tuple[int, int], drawn: str
) -> None:
    body = edited(able, image)
    assert (body["size"], body["metrics"]["rendered_size"]) == ("{}x{}".format(*image), drawn)
    assert "warnings" not in body
    assert edited(able, image, size=body["size"])["size"] == body["size"]


def test_a_picture_beyond_the_limits_is_edited_smaller_and_told(able: Any) -> None:
    body = edited(able, (3000, 1500))
    assert body["size"] == "2896x1440"
    assert "3000x1500" in body["warnings"][0] and "2896x1440" in body["warnings"][0]
    small = edited(able, (32, 48))
    assert small["size"] == "64x96" and "32x48" in small["warnings"][0]


def test_a_size_of_other_proportions_cuts_the_picture_and_says_so(able: Any) -> None:
    body = edited(able, (256, 128), size="128x128")
    assert body["size"] == "128x128" and "cut off" in body["warnings"][0]


def test_a_picture_that_is_only_looked_at_gives_its_proportions(able: Any) -> None:
    assert edited(able, (512, 256), masked=False)["size"] == "176x96"
    assert edited(able, (64, 64), masked=False)["size"] == "128x128"


def test_a_picture_too_narrow_for_any_model_is_named(able: Any) -> None:
    files = {"image": plain_file(size=(2000, 70)), "mask": half_mask((2000, 70))}
    answer = able.http().post(EDITS, data={"prompt": "a cat"}, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


def test_margins_and_a_size_that_contradict_each_other_are_refused(able: Any) -> None:
    fields = {"prompt": "a cat", "expand[right]": "64", "size": "64x64"}
    files = {"image": plain_file(), "mask": half_mask()}
    answer = able.http().post(EDITS, data=fields, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size")
    assert "128x64" in answer.json()["error"]["message"]

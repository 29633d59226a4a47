"""Pictures that clients send: of every kind that cameras and programs make, and of none."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image, ImageCms

from calotype.serving.api.state.settings import FEATURES

EDITS = "/v1/images/edits"
TURNED = 6
"""The EXIF orientation of a picture that was taken with the camera on its side."""


@pytest.fixture(scope="module")
def able(
    tmp_path_factory: pytest.TempPathFactory, shared_running: Callable[..., Any]
) -> Iterator[Any]:
    with shared_running(tmp_path_factory.mktemp("able"), features=set(FEATURES)) as service:
        yield service


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def turned(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = TURNED
    return file_of(plain(width, height), "JPEG", exif=exif)


def edit(service: Any, image: bytes, fields: dict[str, Any] | None = None, **files: bytes) -> Any:
    parts = {"image": image} | files
    answer: httpx.Response = service.http().post(
        EDITS, data={"prompt": "a cat"} | (fields or {}), files=parts
    )
    return answer


def asked(service: Any) -> dict[str, Any]:
    """What the newest job asked the worker for."""
    return dict(service.jobs()[0].request)


MOVING = [plain(), Image.new("RGB", (96, 64), "white")]
UNFIT = {
    "animated PNG": (
        file_of(MOVING[0], save_all=True, append_images=MOVING[1:]),
        "image[0] is animated; send one frame of it.",
    ),
    "animated WebP": (
        file_of(MOVING[0], "WEBP", save_all=True, append_images=MOVING[1:]),
        "image[0] is animated; send one frame of it.",
    ),
    "animated GIF": (
        file_of(MOVING[0], "GIF", save_all=True, append_images=MOVING[1:]),
        "image[0] is animated; send one frame of it.",
    ),
    "HEIC": (
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
        "image[0] is a HEIC picture, as phones take them; convert it to jpeg.",
    ),
    "16 bits of grey": (
        file_of(plain(mode="I;16")),
        "image[0] has 16 bits per channel; convert it to 8 bits.",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_sound_file_that_no_model_can_be_shown_is_refused_at_once(able: Any, name: str) -> None:
    data, sentence = UNFIT[name]
    before = len(able.jobs())
    answer = edit(able, data)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["message"], error["param"]) == (sentence, "image[0]")
    assert len(able.jobs()) == before


def test_a_camera_file_with_a_thumbnail_behind_it_is_a_jpeg(able: Any) -> None:
    data = file_of(plain(), "MPO", save_all=True, append_images=[plain(32, 32)])
    answer = edit(able, data)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_kind_is_taken(able: Any, kind: str) -> None:
    answer = edit(able, file_of(Image.new("RGB", (96, 64), "red"), kind))
    assert answer.status_code == 200, answer.text
    stored = Image.open(io.BytesIO(able.blobs.get(asked(able)["references"][0])))
    assert stored.format in ("PNG", "JPEG", "WEBP") and stored.size == (96, 64)
    red, green, blue = stored.convert("RGB").getpixel((48, 32))
    assert red > 240 and green < 15 and blue < 15


def test_a_picture_for_printing_is_seen_by_its_profile(able: Any) -> None:
    ink = Image.new("CMYK", (96, 64), (0, 255, 255, 0))
    # No profile of a press is at hand; one of another colour space must not be taken for one.
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for options in ({}, {"icc_profile": grey}, {"icc_profile": b"no profile"}):
        answer = edit(able, file_of(ink, "JPEG", quality=95, **options))
        assert answer.status_code == 200, answer.text
        stored = Image.open(io.BytesIO(able.blobs.get(asked(able)["references"][0])))
        assert (stored.mode, stored.size) == ("RGB", (96, 64))
        red, green, blue = stored.getpixel((48, 32))
        assert red > 200 and green < 60 and blue < 60


def test_a_mask_fits_what_a_turned_photograph_looks_like(able: Any) -> None:
    photograph = turned(96, 64)  # seen as 64x96
    fitting = edit(able, photograph, mask=file_of(Image.new("L", (64, 96), 255)))
    assert fitting.status_code == 200, fitting.text
    assert asked(able)["size"] == "64x96"
    lying = edit(able, photograph, mask=file_of(Image.new("L", (96, 64), 255)))
    assert lying.status_code == 400
    assert "mask is 96x64, but the image is 64x96" in lying.json()["error"]["message"]


def test_what_is_drawn_over_a_picture_has_its_size(able: Any) -> None:
    image, mask = file_of(plain(96, 64)), file_of(Image.new("L", (96, 64), 255))
    for fields, size in (
        ({}, "96x64"),
        ({"size": "auto"}, "96x64"),
        ({"size": "192x128"}, "192x128"),
        ({"expand": json.dumps({"right": 32, "top": 64})}, "128x128"),
    ):
        answer = edit(able, image, fields, mask=mask)
        assert answer.status_code == 200, answer.text
        assert asked(able)["size"] == size


@pytest.mark.parametrize(
    ("size", "says"), [((40, 90), "at least 64 pixels"), ((700, 70), "8 times the short one")]
)
def test_a_picture_that_no_model_can_look_at_is_named_as_it_was_sent(
    able: Any, size: tuple[int, int], says: str
) -> None:
    good, bad = file_of(plain(96, 64)), file_of(plain(*size))
    sent = [("image[]", good), ("image[]", bad)]
    answer = able.http().post(EDITS, data={"prompt": "a cat"}, files=sent)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "image[1]" and says in error["message"]
    url = "data:image/png;base64," + base64.b64encode(bad).decode()
    named = able.http().post(
        "/v1/images/generations", json={"prompt": "a cat", "reference_images": [url]}
    )
    assert named.json()["error"]["param"] == "reference_images[0]"


def test_a_file_part_without_a_filename_is_explained(able: Any) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
    body = head + file_of(plain()) + b"\r\n--x--\r\n"
    answer = able.http().post(
        EDITS, content=body, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "image")
    assert "no filename" in error["message"] and "-F image=@" in error["message"]


def test_a_picture_is_continued_beyond_its_edges(able: Any) -> None:
    answer = edit(able, file_of(plain(64, 64)), {"expand": '{"left": 64, "bottom": 32}'})
    assert answer.status_code == 200, answer.text
    request = asked(able)
    assert request["expand"] == {"left": 64, "top": 0, "right": 0, "bottom": 32}
    assert request["image"] and request["size"] == "128x96"
    recipe = answer.json()["recipe"]
    assert recipe["expand"] == request["expand"]
    again = able.http().post("/v1/images/generations", json={"recipe": recipe})
    assert again.status_code == 200, again.text
    assert asked(able)["expand"] == request["expand"]


@pytest.mark.parametrize(
    ("expand", "param"),
    [
        ("{}", "expand"),
        ('{"left": -1}', "expand.left"),
        ('{"left": 1.5}', "expand.left"),
        ('{"around": 5}', "expand.around"),
        ("64", "expand"),
    ],
)
def test_wrong_margins_are_named(able: Any, expand: str, param: str) -> None:
    answer = edit(able, file_of(plain(64, 64)), {"expand": expand})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_objects_of_a_form_are_json_or_one_field_for_each_member(able: Any) -> None:
    fields = {"expand[left]": "64", "metadata[order]": "7"}
    answer = edit(able, file_of(plain(64, 64)), fields)
    assert answer.status_code == 200, answer.text
    assert asked(able)["expand"] == {"left": 64, "top": 0, "right": 0, "bottom": 0}
    assert able.jobs()[0].metadata == {"order": "7"}
    for wrong, param in (
        ({"expand[left]": "64", "expand": '{"right": 64}'}, "expand"),
        ({"expand[left]": ["64", "32"]}, "expand"),
        ({"expand[left]": "wide"}, "expand.left"),
    ):
        answer = edit(able, file_of(plain(64, 64)), wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_margins_want_a_picture(able: Any) -> None:
    answer = able.http().post(
        "/v1/images/generations", json={"prompt": "a cat", "expand": {"left": 16}}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "expand"

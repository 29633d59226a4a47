"""Texts and pictures that nobody sends by chance, through the API, with the real safety stage.

Each is answered: checked, or refused with a type, a code and the parameter. None is left open.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples.images import texture

from calotype.moderation.moderator import Moderator

pytestmark = pytest.mark.slow

GENERATIONS, MODERATIONS, EDITS = "/v1/images/generations", "/v1/moderations", "/v1/images/edits"
TAKEDOWNS = "/v1/moderation/takedowns"
NAKED = "a naked woman in a studio"

TEXTS = {
    "10,000 combining marks": "a\u0301\u0323" * 5_000,
    "marks over a word": "".join(letter + "\u0336\u0301" for letter in "a red fox"),
    "only emoji": "🍎🍐🍊" * 20,
    "only zero-width": "\u200b\u200d\ufeff" * 100,
    "right to left": "\u202ea fox\u202c",
    "only spaces": "   \t\n ",
    "controls": "a fox\x01\x02\x1b[31m",
    "no language": "xq zvw krrt pljd bnmq wxyz " * 10,
    "tag characters": "a fox" + "".join(chr(0xE0000 + ord(c)) for c in " and a dog"),
}
HIDDEN = {
    "zero-width": "\u200b".join(NAKED),
    "combining marks": "".join(letter + "\u0336" for letter in NAKED),
    "tag characters": "a fox" + "".join(chr(0xE0000 + ord(c)) for c in f" {NAKED}"),
    "behind much else": "a quiet lake, " * 300 + NAKED,
}


@pytest.fixture(scope="module")
def checked(
    tmp_path_factory: pytest.TempPathFactory,
    shared_running: Callable[..., AbstractContextManager[Any]],
) -> Iterator[Any]:
    """A gateway whose safety stage is the real one."""
    moderator = Moderator.load()
    with shared_running(tmp_path_factory.mktemp("checked")) as service:
        service.safety.prompt = lambda text: moderator.check_prompt(text).to_payload()
        service.safety.image = lambda pixels: moderator.check_image(pixels).to_payload()
        yield service


def sent(service: Any, path: str, body: Any) -> Any:
    # Escaped, as JSON has it: a lone surrogate cannot be written otherwise.
    return service.http().post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}, timeout=600
    )


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_an_odd_text_is_checked_or_refused_with_its_name(checked: Any, text: str) -> None:
    asked = sent(checked, MODERATIONS, {"input": text})
    assert asked.status_code == 200, asked.text
    assert asked.json()["results"][0]["flagged"] in (True, False)
    drawn = sent(checked, GENERATIONS, {"prompt": text, "steps": 1})
    assert drawn.status_code in (200, 400), drawn.text
    if drawn.status_code == 400:
        error = drawn.json()["error"]
        assert error["param"] == "prompt" or error["code"] == "moderation_blocked"


@pytest.mark.parametrize("text", HIDDEN.values(), ids=HIDDEN)
def test_what_is_hidden_in_one_is_found(checked: Any, text: str) -> None:
    drawn = sent(checked, GENERATIONS, {"prompt": text, "steps": 1})
    assert drawn.status_code == 400
    assert drawn.json()["error"]["code"] == "moderation_blocked"


def test_halves_of_characters_are_no_text(checked: Any) -> None:
    for path, name in ((GENERATIONS, "prompt"), (MODERATIONS, "input")):
        answer = sent(checked, path, {name: "a fox \ud800 and \udfff a dog"})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_json"
        assert "UTF-8" in answer.json()["error"]["message"]


def test_a_megabyte_of_text_is_refused_by_its_length(checked: Any) -> None:
    for path, body, param in (
        (GENERATIONS, {"prompt": "a" * 2**20}, "prompt"),
        (MODERATIONS, {"input": "a" * 2**20}, "input"),
        (MODERATIONS, {"input": ["a", "b" * 2**20]}, "input[1]"),
    ):
        answer = sent(checked, path, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert "characters" in answer.json()["error"]["message"]


def file_of(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def animation(frames: int) -> bytes:
    images = [Image.new("RGB", (16, 16), (5 * n, 0, 0)) for n in range(frames)]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def with_profile_bomb() -> bytes:
    body = b"bomb\0\0" + zlib.compress(bytes(60 * 2**20), 9)
    crc = struct.pack(">I", zlib.crc32(b"iCCP" + body))
    bomb = struct.pack(">I", len(body)) + b"iCCP" + body + crc
    data = file_of(texture(1, 64))
    return data[:33] + bomb + data[33:]


IMAGES: dict[str, Callable[[], bytes]] = {
    "50 frames": lambda: animation(50),
    "truncated jpeg": lambda: file_of(texture(1, 256), "JPEG")[:1500],
    "profile bomb": with_profile_bomb,
    "9000x9000 of one colour": lambda: file_of(np.zeros((9000, 9000, 3), dtype=np.uint8)),
    "no picture": lambda: b"%PDF-1.7 nothing to see",
    "a format that starts a program": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>',
}


@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
def test_an_odd_picture_is_refused_wherever_it_is_sent(
    checked: Any, make: Callable[[], bytes]
) -> None:
    data = make()
    encoded = base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    asked = sent(checked, MODERATIONS, {"input": [part]})
    edited = checked.http().post(
        EDITS, data={"prompt": "a fox"}, files={"image": ("a.png", data, "image/png")}
    )
    key = checked.database.api_keys.create(team="safety", scopes=("moderation",))[0]
    body = {"image": encoded, "category": "sexual", "reason": "r"}
    taken = checked.http(key).post(TAKEDOWNS, json=body)
    for answer in (asked, edited, taken):
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["code"] == "invalid_image" and "image" in error["param"]


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_line_of_pixels_is_checked(checked: Any, size: tuple[int, int]) -> None:
    data = file_of(np.full((*size, 3), 90, dtype=np.uint8))
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    answer = sent(
        checked, MODERATIONS, {"input": [{"type": "image_url", "image_url": {"url": url}}]}
    )
    assert answer.status_code == 200 and not answer.json()["results"][0]["flagged"]


def test_every_view_of_a_picture_is_checked(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red on transparent: on white and on black; eight frames: each of them."""
    seen: list[Any] = []

    def look(pixels: Any) -> dict[str, Any]:
        seen.append(pixels.copy())
        return before(pixels)

    before = checked.safety.image
    monkeypatch.setattr(checked.safety, "image", look)
    glass = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    file = io.BytesIO()
    glass.save(file, "PNG")
    for data, views in ((file.getvalue(), 2), (animation(8), 8)):
        seen.clear()
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = sent(checked, MODERATIONS, {"input": [part]})
        assert answer.status_code == 200 and len(answer.json()["results"]) == 1
        assert len(seen) == views
    many = sent(checked, MODERATIONS, {"input": [part] * 9})
    assert many.status_code == 400 and "64 frames" in many.json()["error"]["message"]

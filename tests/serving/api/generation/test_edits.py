"""Edits and variations: every spelling of a body, sound and unsound pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from samples.images import half_mask as mask
from samples.images import plain_file as sample
from samples.images import same_pixels

from calotype.serving.api.state.settings import FEATURES
from calotype.serving.config import BUILT_IN_MODEL

EDITS = "/v1/images/edits"


def bomb() -> bytes:
    """Few bytes of very many pixels."""
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory, shared_running: Callable[..., Any]) -> Any:
    """A service whose workers can do everything."""
    with shared_running(tmp_path_factory.mktemp("able"), features=set(FEATURES)) as service:
        yield service


def seen_by_worker(service: Any) -> dict[str, Any]:
    """What the newest job asked the worker for."""
    return dict(service.jobs()[0].request)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_what_the_workers_cannot_do_is_refused_by_name(
    start_service: Callable[..., Any], quick: Callable[..., Any]
) -> None:
    sdk = start_service(settings=quick(features=set())).sdk()
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.edit(image=sample(), prompt="a cat")
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "image")
    assert "edits" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.create_variation(image=sample())
    assert "variations" in caught.value.message
    for name, value in (
        ("reference_images", ["https://example.com/a.png"]),
        ("negative_prompt", "dog"),
        ("sigmas", [1.0, 0.5]),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.images.generate(prompt="a cat", extra_body={name: value})
        assert (caught.value.code, caught.value.param) == ("unsupported_value", name)


def test_bytes_a_file_and_several_files_are_edited(able: Any) -> None:
    sdk = able.sdk()
    for image in (sample(), io.BytesIO(sample()), [sample(), sample("blue")]):
        answer = sdk.images.edit(image=image, prompt="a cat", extra_body={"seed": 1})
        assert answer.data[0].b64_json
        wanted = len(image) if isinstance(image, list) else 1
        assert len(seen_by_worker(able)["references"]) == wanted


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]", "images", "images[]"])
def test_every_spelling_of_an_image_part_is_read(able: Any, name: str) -> None:
    files = [(name, ("upload", sample(), "application/octet-stream"))]
    answer = able.http().post(EDITS, data={"prompt": "a cat"}, files=files)
    assert answer.status_code == 200, answer.text


def test_a_mask_marks_what_is_drawn_anew(able: Any) -> None:
    able.sdk().images.edit(image=[sample(), sample("blue")], mask=mask(), prompt="a cat")
    asked = seen_by_worker(able)
    assert asked["image"] and asked["mask"] and len(asked["references"]) == 1
    marked = Image.open(io.BytesIO(able.blobs.get(asked["mask"])))
    assert marked.mode == "L"
    assert (marked.getpixel((0, 0)), marked.getpixel((63, 0))) == (255, 0)


@pytest.mark.parametrize("name", ["mask[]", "mask[0]"])
def test_a_mask_is_known_by_every_spelling(able: Any, name: str) -> None:
    files = {"image": sample(), name: mask()}
    assert able.http().post(EDITS, data={"prompt": "a cat"}, files=files).status_code == 200
    assert seen_by_worker(able)["mask"]


def test_a_file_of_another_name_is_refused_by_name(able: Any) -> None:
    files = {"image": sample(), "control": sample()}
    answer = able.http().post(EDITS, data={"prompt": "a cat"}, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unknown_parameter")
    assert error["param"] == "control" and "image and mask" in error["message"]


@pytest.mark.parametrize(
    "given",
    [
        {"image": data_url(sample())},
        {"image": [data_url(sample())]},
        {"image": {"image_url": {"url": data_url(sample())}}},
        {"images": [base64.b64encode(sample()).decode()]},
        {"image": base64.b64encode(sample(kind="JPEG")).decode()},
    ],
)
def test_json_names_an_image_as_other_clients_do(able: Any, given: dict[str, Any]) -> None:
    answer = able.http().post(EDITS, json={"prompt": "a cat"} | given)
    assert answer.status_code == 200, answer.text
    assert len(seen_by_worker(able)["references"]) == 1


@pytest.mark.parametrize(
    ("model", "kind"),
    [("dall-e-2", "url"), ("dall-e-3", "url"), ("gpt-image-1", "b64_json"), (None, "b64_json")],
)
def test_pictures_come_as_openai_gives_them_by_the_model_that_is_named(
    able: Any, model: str | None, kind: str
) -> None:
    answer = able.http().post("/v1/images/generations", json={"prompt": "a fox", "model": model})
    assert kind in answer.json()["data"][0]
    plain = able.http().post(
        "/v1/images/generations",
        json={"prompt": "a fox", "model": model, "response_format": "b64_json"},
    )
    assert "b64_json" in plain.json()["data"][0]


def test_strings_of_a_form_become_numbers(able: Any) -> None:
    answer = able.http().post(
        EDITS,
        data={"prompt": "a cat", "n": "2", "seed": "7", "guidance_scale": "2.5", "stream": "false"},
        files={"image": sample()},
    )
    assert answer.status_code == 200, answer.text
    assert [item["seed"] for item in answer.json()["data"]] == [7, 8]


@pytest.mark.parametrize(
    ("name", "text", "code", "says"),
    [
        ("n", "two", "invalid_type", "valid integer"),
        ("n", "1.5", "invalid_type", "integer"),
        ("n", "", "invalid_type", "integer"),
        ("n", "11", "invalid_value", "less than or equal to 10"),
        ("guidance", "much", "invalid_type", "valid number"),
        ("guidance_scale", "nan", "invalid_value", "finite number"),
        ("stream", "perhaps", "invalid_type", "valid boolean"),
        ("loras[0][scale]", "strong", "invalid_type", "valid number"),
    ],
)
def test_strings_of_a_form_that_are_none_of_these_are_named(
    able: Any, name: str, text: str, code: str, says: str
) -> None:
    fields = {"prompt": "a cat", "loras[0][id]": "stripes", name: text}
    answer = able.http().post(EDITS, data=fields, files={"image": sample()})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == code and says in error["message"]
    param = {"guidance": "guidance_scale", "loras[0][scale]": "loras[0].scale"}.get(name, name)
    assert error["param"] == param


def test_adapters_of_a_form_are_json_or_indexed_and_never_guessed(able: Any) -> None:
    def send(fields: dict[str, Any]) -> httpx.Response:
        answer: httpx.Response = able.http().post(
            EDITS, data={"prompt": "a cat"} | fields, files={"image": sample()}
        )
        return answer

    wanted = [{"id": "stripes", "scale": 0.5}]
    for fields in (
        {"loras": json.dumps(wanted)},
        {"loras[0][id]": "stripes", "loras[0][scale]": "0.5"},
    ):
        answer = send(fields)
        assert answer.status_code == 200, answer.text
        assert seen_by_worker(able)["loras"] == wanted
    column = send({"loras[][id]": "stripes", "loras[][scale]": "0.5"})
    assert column.status_code == 400
    assert column.json()["error"]["param"] == "loras"
    assert "JSON" in column.json()["error"]["message"]
    assert send({"loras": "[1, NaN]"}).json()["error"]["param"] == "loras"


def test_an_edit_in_json_names_its_pictures(able: Any) -> None:
    client = able.http()
    upload = client.post("/v1/files", data={"purpose": "vision"}, files={"file": sample("green")})
    file_id = upload.json()["id"]
    body = {
        "prompt": "a cat",
        "images": [{"image_url": data_url(sample())}, {"file_id": file_id}],
        "mask": {"image_url": data_url(mask())},
        "moderation": "auto",
        "input_fidelity": "high",
    }
    answer = client.post(EDITS, json=body)
    assert answer.status_code == 200, answer.text
    asked = seen_by_worker(able)
    assert able.blobs.get(asked["references"][0]) == sample("green")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_a_variation_has_an_image_and_no_prompt(able: Any) -> None:
    answer = able.sdk().images.create_variation(image=sample(), n=2)
    assert len(answer.data) == 2
    assert seen_by_worker(able)["image"]


def test_ten_reference_images_are_looked_at_and_no_more(able: Any) -> None:
    for count, status in ((10, 200), (11, 400)):
        body = {"prompt": "a cat", "reference_images": [data_url(sample())] * count}
        answer = able.http().post("/v1/images/generations", json=body)
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "reference_images"
    assert "at most 10" in answer.json()["error"]["message"]
    assert len(seen_by_worker(able)["references"]) == 10


def test_a_model_may_take_fewer_reference_images(
    start_service: Callable[..., Any], quick: Callable[..., Any]
) -> None:
    service = start_service(settings=quick(features=set(FEATURES)))
    limits = BUILT_IN_MODEL.spec.limits.model_copy(update={"max_reference_images": 2})
    spec = BUILT_IN_MODEL.spec.model_copy(update={"limits": limits})
    service.catalog.replace([BUILT_IN_MODEL.model_copy(update={"spec": spec})], [])
    body = {"prompt": "a cat", "reference_images": [data_url(sample())] * 3}
    answer = service.http().post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "reference_images"
    assert "3 reference pictures; shapes takes at most 2" in answer.json()["error"]["message"]


def test_a_generation_looks_at_reference_images(able: Any) -> None:
    body = {"prompt": "a cat", "reference_images": [data_url(sample())], "seed": 4}
    first = able.http().post("/v1/images/generations", json=body).json()
    assert len(seen_by_worker(able)["references"]) == 1
    body["reference_images"] = [data_url(sample("blue"))]
    other = able.http().post("/v1/images/generations", json=body).json()
    assert not same_pixels(*(answer["data"][0]["b64_json"] for answer in (first, other)))


def test_edits_are_streamed_under_their_own_name(able: Any) -> None:
    stream = able.sdk().images.edit(image=sample(), prompt="a cat", stream=True)
    assert [event.type for event in stream] == ["image_edit.completed"]


BAD_FILES: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", 400, "empty_image_file"),
    ("no picture", b"hello" * 100, 400, "invalid_image"),
    ("half a picture", sample("red", (256, 256))[:120], 400, "invalid_image"),
    ("half a gif", sample(kind="GIF")[:20], 400, "invalid_image"),
    ("half a bmp", sample(kind="BMP")[:60], 400, "invalid_image"),
    ("a bomb", bomb(), 400, "invalid_image"),
    ("an svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "invalid_image"),
]


@pytest.mark.parametrize(
    ("data", "status", "code"), [case[1:] for case in BAD_FILES], ids=[c[0] for c in BAD_FILES]
)
def test_a_file_that_is_no_sound_picture_is_named(
    able: Any, data: bytes, status: int, code: str
) -> None:
    answer = able.http().post(
        EDITS, data={"prompt": "x"}, files={"image": ("a.png", data, "image/png")}
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["param"] == "image[0]"


@pytest.mark.parametrize(
    ("parts", "param", "says"),
    [
        ({"mask": mask((32, 32))}, "mask", "32x32"),
        ({"mask": mask(alpha=255)}, "mask", "marks nothing"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(
    able: Any, parts: dict[str, bytes], param: str, says: str
) -> None:
    answer = able.http().post(EDITS, data={"prompt": "x"}, files={"image": sample()} | parts)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert says in answer.json()["error"]["message"]


BROKEN: list[tuple[str, str, bytes]] = [
    ("no boundary", "multipart/form-data", b"--x\r\n"),
    ("nothing", "multipart/form-data; boundary=x", b""),
    ("no end", "multipart/form-data; boundary=x",
     b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nhello'),
    ("no name", "multipart/form-data; boundary=x",
     b"--x\r\nContent-Disposition: form-data\r\n\r\nhello\r\n--x--\r\n"),
    ("noise", "multipart/form-data; boundary=x", b"\x00\xff" * 500),
    ("a part in the part's head", "multipart/form-data; boundary=x", b"--x\r\n--x\r\n--x--"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body"), [c[1:] for c in BROKEN], ids=[c[0] for c in BROKEN])
def test_a_broken_multipart_body_is_a_400(able: Any, kind: str, body: bytes) -> None:
    answer = able.http().post(EDITS, content=body, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_too_many_parts_and_a_prompt_twice_are_refused(able: Any) -> None:
    client = able.http()
    files = [("image", sample())] * 21
    assert client.post(EDITS, data={"prompt": "x"}, files=files).status_code == 400
    files = [("image", sample())] * 17
    many = client.post(EDITS, data={"prompt": "x"}, files=files)
    assert (many.status_code, many.json()["error"]["param"]) == (400, "images")
    twice = client.post(EDITS, data={"prompt": ["x", "y"]}, files={"image": sample()})
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("images", "status", "param"),
    [
        ([], 400, "images"),
        (["no url"], 400, "images[0].image_url"),
        ([{}], 400, "images[0]"),
        ([{"image_url": "https://example.com/a", "file_id": "x"}], 400, "images[0]"),
        ([{"file_id": "file_none"}], 404, "images[0].file_id"),
        ([{"image_url": 3}], 400, "images[0].image_url"),
        ([{"image_url": "data:image/png;base64,****"}], 400, "images[0].image_url"),
        ([{"image_url": "data:image/png,x"}], 400, "images[0].image_url"),
        (7, 400, "images"),
    ],
)
def test_a_picture_that_json_names_wrongly_is_named(
    able: Any, images: Any, status: int, param: str
) -> None:
    answer = able.http().post(EDITS, json={"prompt": "x", "images": images})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param

"""What a request may say beside a prompt, on the real service: given pictures, masks, previews."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from samples.images import same_pixels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT = "a large red circle on a blue background"


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def left_half(size: int = 128) -> bytes:
    """A mask that is transparent, to be drawn anew, in its left half."""
    mask = Image.new("RGBA", (size, size), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size // 2, size))
    return png(mask)


def decoded(answer: Any) -> bytes:
    return base64.b64decode(answer.data[0].b64_json)


def test_partial_images_are_streamed_before_the_picture(service: Any) -> None:
    found = list(
        service.sdk().images.generate(
            model="gpt-image-1",
            prompt=PROMPT,
            size="auto",
            stream=True,
            partial_images=2,
            extra_body={"seed": 7, "steps": 30},
        )
    )
    kinds = [event.type for event in found]
    assert kinds == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    first, second, last = (base64.b64decode(event.b64_json) for event in found)
    assert Image.open(io.BytesIO(first)).format == "PNG"
    assert first != second
    final = pixels(last)
    # A preview shows what is coming: the later one is nearer to the end.
    distances = [abs(pixels(data) - final).mean() for data in (first, second)]
    assert distances[1] < distances[0]
    assert same_pixels(last, service.draw(PROMPT, steps=30)), "previews change nothing"


def test_an_edit_with_a_mask_draws_only_what_it_marks(service: Any) -> None:
    given = service.draw("a green square on a white background", size="128x128")
    answer = service.sdk().images.edit(
        model="gpt-image-1",
        image=("given.png", given, "image/png"),
        mask=("mask.png", left_half(), "image/png"),
        prompt=PROMPT,
        size="128x128",
        extra_body={"seed": 3},
    )
    before, after = pixels(given), pixels(decoded(answer))
    assert (before[:, 64:] == after[:, 64:]).all(), "what is not marked stays to the bit"
    assert abs(before[:, :64] - after[:, :64]).mean() > 5


def test_outside_the_mask_an_enlarged_edit_stays_too(service: Any) -> None:
    given = png(Image.effect_mandelbrot((1024, 1024), (-2, -1.5, 1, 1.5), 40).convert("RGB"))
    answer = service.sdk().images.edit(
        model="gpt-image-1",
        image=("given.png", given, "image/png"),
        mask=("mask.png", left_half(1024), "image/png"),
        prompt=PROMPT,
        size="1024x1024",
        extra_body={"seed": 3, "steps": 4},
    )
    before, after = pixels(given), pixels(decoded(answer))
    assert (before[:, 512:] == after[:, 512:]).all()
    assert (before[:, :512] != after[:, :512]).any()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_continued_beyond_its_edges(service: Any, kind: str) -> None:
    drawn = Image.open(io.BytesIO(service.draw(PROMPT, size="128x128")))
    file = io.BytesIO()
    drawn.convert("RGB").save(file, kind)
    answer = service.sdk().images.edit(
        model="gpt-image-1",
        image=(f"given.{kind.lower()}", file.getvalue(), f"image/{kind.lower()}"),
        prompt=PROMPT,
        extra_body={"seed": 3, "steps": 4, "expand": {"left": 32, "right": 32}},
    )
    before, after = pixels(file.getvalue()), pixels(decoded(answer))
    assert after.shape == (128, 192, 3), "its own size with the margins"
    assert (after[:, 32:160] == before).all(), "the inside stays to the bit"
    assert after[:, :32].std() > 0 and (after[:, :32] != before[:, :1]).any()


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_a_variation_starts_from_its_picture(service: Any) -> None:
    given = service.draw(PROMPT, size="128x128")
    size: Any = "128x128"  # none of the three sizes that the SDK's own type knows
    distances = []
    for strength in (0.2, 0.9):
        answer = service.sdk().images.create_variation(
            model="dall-e-2",
            image=given,
            size=size,
            response_format="b64_json",
            extra_body={"strength": strength, "seed": 1},
        )
        distances.append(abs(pixels(decoded(answer)) - pixels(given)).mean())
    assert distances[0] < distances[1] / 2


@pytest.mark.parametrize(
    "more",
    [
        {"negative_prompt": "blue", "guidance_scale": 3},
        {"sampler": "flow-heun"},
        {"sigmas": [1.0, 0.9, 0.5, 0.2], "steps": 4},
        {"reference_images": ["REFERENCE"]},
    ],
    ids=["negative prompt", "sampler", "noise levels", "reference"],
)
def test_what_is_asked_for_changes_the_picture(service: Any, more: dict[str, Any]) -> None:
    plain = {"size": "128x128", "steps": 4, "guidance_scale": 3}
    if "reference_images" in more:
        image = png(Image.new("RGB", (128, 128), "lime"))
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        more = {"reference_images": [url]}
    asked = service.draw(PROMPT, **plain | more)
    assert same_pixels(asked, service.draw(PROMPT, **plain | more)), "and a seed repeats it"
    difference = abs(pixels(asked) - pixels(service.draw(PROMPT, **plain)))
    assert difference.max() > 8


def test_an_unknown_sampler_is_refused_with_those_that_there_are(service: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.sdk().images.generate(prompt=PROMPT, extra_body={"sampler": "ddim"})
    assert caught.value.param == "sampler"
    assert "flow-euler" in caught.value.message


def test_a_blocked_negative_prompt_is_refused(service: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.sdk().images.generate(
            prompt=PROMPT,
            extra_body={
                "negative_prompt": "a photograph of two people having explicit sexual intercourse"
            },
        )
    assert caught.value.code == "moderation_blocked"


def test_a_file_carries_its_recipe_and_the_recipe_draws_it_again(service: Any) -> None:
    from calotype.serving.images.recipe_metadata import extract_recipe

    with service.http() as client:
        asked = {"prompt": PROMPT, "size": "128x128", "steps": 4, "response_format": "b64_json"}
        answer = client.post("/v1/images/generations", json=asked).json()
        job = client.get(f"/v1/jobs/{answer['job_id']}").json()
        data = base64.b64decode(answer["data"][0]["b64_json"])
        stamped = extract_recipe(data)
        assert stamped is not None and "prompt" not in stamped
        assert stamped["seed"] == answer["data"][0]["seed"]
        again = client.post(
            "/v1/images/generations", json={"recipe": job["recipe"], "response_format": "b64_json"}
        ).json()
    assert same_pixels(again["data"][0]["b64_json"], data)

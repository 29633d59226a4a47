"""POST /v1/images/generations through the official OpenAI SDK."""

from __future__ import annotations

import base64
import io
from typing import Any

import openai
import pytest
from PIL import Image
from samples.images import same_pixels

from calotype.serving.testing.in_memory import decision


def image(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_a_prompt_becomes_a_picture_with_the_models_own_defaults(shared_service: Any) -> None:
    answer = shared_service.sdk().images.generate(prompt="a red circle")
    assert image(answer.data[0].b64_json).size == (128, 128)
    assert image(answer.data[0].b64_json).format == "PNG"
    assert answer.size == "128x128"
    assert answer.quality == "medium"
    assert answer.background == "opaque"
    assert answer.metrics["steps"] == 20
    assert answer.metrics["rendered_size"] == "128x128"
    assert answer.usage.output_tokens == 64
    assert answer.usage.total_tokens == answer.usage.input_tokens + 64


def test_the_same_seed_gives_the_same_pixels_and_another_gives_others(shared_service: Any) -> None:
    def draw(seed: int) -> str:
        answer = shared_service.sdk().images.generate(
            model="dall-e-3",
            prompt="a red circle",
            size="256x256",
            response_format="b64_json",
            extra_body={"seed": seed},
        )
        return str(answer.data[0].b64_json)

    assert same_pixels(draw(7), draw(7))
    assert not same_pixels(draw(7), draw(8))


def test_the_answer_carries_its_headers_once(shared_service: Any) -> None:
    answer = shared_service.generate(prompt="a dog", n=3, seed=40)
    assert answer.status_code == 200
    headers = answer.headers
    assert headers["x-image-seeds"] == "40,41,42"
    assert headers["x-image-flagged"] == "0,0,0"
    assert int(headers["openai-processing-ms"]) >= 0
    assert headers["x-job-id"] == answer.json()["job_id"]
    assert len(headers.get_list("x-request-id")) == 1
    assert [item["seed"] for item in answer.json()["data"]] == [40, 41, 42]
    assert "url" not in answer.json()["data"][0]


def test_a_missing_seed_is_chosen_and_told(shared_service: Any) -> None:
    first, second = (shared_service.generate(prompt="a dog").json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = shared_service.generate(prompt="a dog", seed=first["seed"]).json()["data"][0]
    assert same_pixels(again["b64_json"], first["b64_json"])


@pytest.mark.parametrize(
    ("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
)
def test_the_output_format_is_honoured(shared_service: Any, output_format: str, kind: str) -> None:
    answer = shared_service.sdk().images.generate(
        prompt="a dog", output_format=output_format, output_compression=60
    )
    assert image(answer.data[0].b64_json).format == kind
    assert answer.output_format == output_format


def test_large_sizes_are_drawn_small_and_enlarged_and_the_answer_says_so(
    shared_service: Any,
) -> None:
    answer = shared_service.generate(prompt="a dog", size="1792x1024").json()
    assert image(answer["data"][0]["b64_json"]).size == (1792, 1024)
    assert answer["metrics"]["rendered_size"] == "224x128"


def test_width_and_height_win_over_size(shared_service: Any) -> None:
    answer = shared_service.generate(prompt="a dog", size="512x512", width=96, height=64).json()
    assert answer["size"] == "96x64"


@pytest.mark.parametrize(
    ("quality", "steps", "reported"),
    [("low", 10, "low"), ("hd", 30, "high"), ("standard", 20, "medium"), ("auto", 20, "medium")],
)
def test_quality_stands_for_steps(
    shared_service: Any, quality: str, steps: int, reported: str
) -> None:
    answer = shared_service.generate(prompt="a dog", quality=quality).json()
    assert (answer["metrics"]["steps"], answer["quality"]) == (steps, reported)
    exact = shared_service.generate(prompt="a dog", quality=quality, steps=3).json()
    assert exact["metrics"]["steps"] == 3


def test_an_adapter_at_scale_0_equals_none_and_changes_the_picture_at_1(
    shared_service: Any,
) -> None:
    def draw(**more: Any) -> str:
        answer = shared_service.generate(prompt="a dog", seed=1, **more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"][0]["b64_json"])

    plain = draw()
    striped = draw(loras=[{"id": "stripes"}])
    assert same_pixels(draw(loras=[{"id": "stripes", "scale": 0}]), plain)
    assert not same_pixels(striped, plain)
    assert same_pixels(draw(image_loras=[{"path": "stripes", "scale": 1}]), striped)


def test_guidance_has_an_alias(shared_service: Any) -> None:
    one, other, plain = (
        shared_service.generate(prompt="a dog", seed=1, **more).json()
        for more in ({"guidance": 2.5}, {"guidance_scale": 2.5}, {})
    )
    assert same_pixels(*(answer["data"][0]["b64_json"] for answer in (one, other)))
    assert one["recipe_hash"] == other["recipe_hash"] != plain["recipe_hash"]


def test_style_adds_words_and_says_which(shared_service: Any) -> None:
    item = shared_service.generate(prompt="a dog", style="vivid").json()["data"][0]
    assert item["revised_prompt"].startswith("a dog, vivid")


def test_what_openais_clients_send_besides_is_accepted(shared_service: Any) -> None:
    answer = shared_service.generate(
        prompt="a dog",
        user="u1",
        safety_identifier="s1",
        moderation="low",
        background="auto",
        stream=False,
        partial_images=0,
        complexity="low",
        n=None,
        size="auto",
        negative_prompt="",
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["safety_identifier"] == "s1"


def test_a_blocked_prompt_is_refused_and_no_picture_exists(service: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.sdk().images.generate(prompt="something forbidden")
    error = caught.value
    assert error.code == "moderation_blocked"
    assert error.type == "image_generation_user_error"
    assert error.body["moderation_details"] == {
        "moderation_stage": "input",
        "categories": ["sexual"],
    }
    assert error.body["moderation"]["decision_id"].startswith("dec_")
    assert error.body["moderation"]["policy"] == "scripted@1"
    assert error.body["message"] == (
        "Your request was rejected as a result of the safety system. If you believe this is an "
        f"error, contact your administrator and include the request ID {error.request_id}. "
        "safety_violations=[sexual]."
    )
    assert service.blobs.blobs == {}
    [job] = service.jobs()
    assert job.status == "failed"
    assert service.generate(prompt="a dog").status_code == 200


def test_a_wholly_blocked_batch_is_refused_and_nothing_is_stored(service: Any) -> None:
    service.safety.image = lambda pixels: decision("output", blocked=["violence/graphic"])
    answer = service.generate(prompt="a dog", n=2)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "moderation_blocked"
    assert error["moderation_details"] == {
        "moderation_stage": "output",
        "categories": ["violence/graphic"],
    }
    assert service.blobs.blobs == {}


def test_a_partly_blocked_batch_leaves_the_blocked_pictures_out(service: Any) -> None:
    verdicts = iter([decision("output"), decision("output", blocked=["sexual"])])
    service.safety.image = lambda pixels: next(verdicts, decision("output", flagged=["violence"]))
    answer = service.generate(prompt="a dog", n=3, seed=5)
    assert answer.status_code == 200
    assert [item["seed"] for item in answer.json()["data"]] == [5, 7]
    assert answer.headers["x-images-blocked"] == "1"
    assert answer.headers["x-image-flagged"] == "0,1"
    assert answer.json()["moderation"] == {
        "blocked": [{"index": 1, "moderation_stage": "output", "categories": ["sexual"]}]
    }
    assert len(service.blobs.blobs) == 2


def test_nothing_passes_while_the_classifiers_are_away(service: Any) -> None:
    service.safety.prompt = lambda text: decision(unavailable=True)
    answer = service.generate(prompt="a dog")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "moderation_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    service.safety.prompt = lambda text: decision("input")
    assert service.generate(prompt="a dog").status_code == 200


async def test_the_asynchronous_client_works_too(shared_service: Any) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{shared_service.url}/v1", api_key=shared_service.key, max_retries=0
    ) as client:
        answer = await client.images.generate(prompt="a dog", n=2)
    assert len(answer.data or []) == 2


@pytest.mark.parametrize(
    ("prompt", "entry"),
    [
        ("a fox <lora:stripes:0.8>", '{"id": "stripes", "scale": 0.8}'),
        ("<lora:my style> a fox", '{"id": "my style", "scale": 1.0}'),
    ],
)
def test_an_adapter_named_in_the_prompt_is_explained(
    shared_service: Any, prompt: str, entry: str
) -> None:
    answer = shared_service.sdk().images.generate(prompt=prompt)
    (warning,) = answer.warnings
    assert entry in warning
    assert "warnings" not in shared_service.sdk().images.generate(prompt="a <b> fox").model_extra

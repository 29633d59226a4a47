"""One recipe behind every picture: told, stamped into the file, and drawn again."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from samples.images import same_pixels

from calotype.serving.api.state.settings import FEATURES
from calotype.serving.images.recipe_metadata import extract_recipe
from calotype.serving.jobs.recipe import recipe_hash


def draw(service: Any, **body: Any) -> dict[str, Any]:
    answer = service.generate(**body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert answer.headers["x-recipe-hash"] == found["recipe_hash"]
    return found


def file_of(answer: dict[str, Any], index: int = 0) -> bytes:
    return base64.b64decode(answer["data"][index]["b64_json"])


def test_every_answer_tells_its_recipe_and_its_hash(shared_service: Any) -> None:
    answer = draw(shared_service, prompt="a dog", loras=[{"id": "stripes"}])
    recipe = answer["recipe"]
    assert recipe_hash(recipe) == answer["recipe_hash"]
    assert recipe["model"]["digest"].startswith("sha256:")
    assert recipe["adapters"][0]["digest"].startswith("sha256:")
    assert recipe["seed"] == answer["data"][0]["seed"]
    assert (recipe["steps"], recipe["size"]) == (20, "128x128"), "defaults are filled in"
    assert recipe["build"].count("+") == 1
    job = shared_service.http().get(f"/v1/jobs/{answer['job_id']}").json()
    assert (job["recipe"], job["recipe_hash"]) == (recipe, answer["recipe_hash"])
    assert "ct_live" not in str(recipe)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_posting_a_recipe_again_gives_the_same_pixels(
    shared_service: Any, output_format: str
) -> None:
    first = draw(
        shared_service,
        **{"prompt": "a dog", "n": 2, "style": "vivid", "output_format": output_format},
        **{"loras": [{"id": "stripes", "scale": 0.5}], "quality": "low", "size": "256x128"},
    )
    again = draw(shared_service, recipe=first["recipe"], response_format="b64_json")
    assert all(same_pixels(file_of(again, i), file_of(first, i)) for i in (0, 1))
    assert again["recipe_hash"] == first["recipe_hash"]
    assert again["recipe_changes"] == []
    job = shared_service.http().post(
        "/v1/jobs", json={"recipe": first["recipe"]}, headers={"prefer": "wait=20"}
    )
    image = job.json()["output"]["images"][0]
    assert same_pixels(shared_service.fetch(image["url"]).content, file_of(first))


def test_a_recipe_of_another_build_is_drawn_and_the_answer_says_what_changed(
    shared_service: Any,
) -> None:
    recipe = draw(shared_service, prompt="a dog")["recipe"]
    old = recipe | {"build": "0.0.9+000000000000"}
    old["model"] = recipe["model"] | {"digest": "sha256:other"}
    answer = shared_service.generate(recipe=old)
    changes = {change["field"]: change for change in answer.json()["recipe_changes"]}
    assert set(changes) == {"build", "model.digest"}
    assert changes["build"] == {
        "field": "build",
        "was": "0.0.9+000000000000",
        "is": recipe["build"],
    }
    unknown = shared_service.generate(recipe=old | {"denoiser": "future"})
    assert unknown.status_code == 400
    assert unknown.json()["error"]["param"] == "denoiser", "what cannot be honoured is named"


def test_a_recipe_stands_alone(shared_service: Any) -> None:
    recipe = draw(shared_service, prompt="a dog")["recipe"]
    answer = shared_service.generate(recipe=recipe, steps=3)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steps")


def test_a_file_carries_the_recipe_of_its_own_picture(service: Any) -> None:
    service.database.teams.set_team("default", prompt_in_files=True)
    for output_format in ("png", "jpeg", "webp"):
        answer = draw(service, prompt="ünïcode", n=2, seed=40, output_format=output_format)
        carried = extract_recipe(file_of(answer, 1))
        assert carried is not None
        assert (carried["seed"], carried["n"], carried["prompt"]) == (41, 1, "ünïcode")
        alone = draw(service, recipe=carried)
        assert same_pixels(file_of(alone), file_of(answer, 1))
        assert alone["recipe_hash"] == recipe_hash(carried)


def test_a_team_that_does_not_allow_it_keeps_its_prompts_out_of_files(service: Any) -> None:
    answer = draw(service, prompt="a secret project")
    data = file_of(answer)
    carried = extract_recipe(data)
    assert carried is not None and "prompt" not in carried
    assert b"secret project" not in data
    assert carried["recipe_hash"] == answer["recipe_hash"]
    alone = service.generate(recipe=carried)
    assert (alone.status_code, alone.json()["error"]["param"]) == (400, "prompt")
    whole = draw(service, recipe=carried, prompt="a secret project")
    assert same_pixels(file_of(whole), data)


def test_a_recipe_of_an_edit_finds_its_pictures_again(
    start_service: Callable[..., Any], quick: Callable[..., Any]
) -> None:
    service = start_service(settings=quick(features=set(FEATURES)))
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    answer = service.http().post(
        "/v1/images/edits", data={"prompt": "a cat"}, files={"image": file.getvalue()}
    )
    first = answer.json()
    again = service.http().post("/v1/images/edits", json={"recipe": first["recipe"]})
    assert same_pixels(file_of(again.json()), file_of(first))
    gone = {**first["recipe"], "references": [{"sha256": "0" * 64}]}
    missing = service.http().post("/v1/images/edits", json={"recipe": gone})
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "recipe.references[0]"

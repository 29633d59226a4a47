"""Control maps and uses of references in requests: every route, recipes, estimates, refusals."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from samples.controls import map_of
from samples.images import plain_file as sample

from calotype.serving.api.state.settings import FEATURES

MAP = map_of(128, 128)
ROUTE = "/v1/images/generations"


def url_of(data: bytes) -> dict[str, str]:
    return {"image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}


CONTROL = {"id": "layout", "image": url_of(MAP), "scale": 0.75, "end": 0.8}


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory, shared_running: Callable[..., Any]) -> Any:
    with shared_running(tmp_path_factory.mktemp("able"), features=set(FEATURES)) as service:
        yield service


def seen_by_worker(service: Any) -> dict[str, Any]:
    return dict(service.jobs()[0].request)


def test_a_map_reaches_the_worker_with_its_numbers_and_stands_in_the_recipe(able: Any) -> None:
    body = able.generate(prompt="a cat", seed=1, controlnets=[CONTROL]).json()
    (control,) = seen_by_worker(able)["controls"]
    assert able.blobs.get(control["image"]) == MAP
    assert (control["id"], control["type"], control["scale"]) == ("layout", "none", 0.75)
    assert (control["start"], control["end"]) == (0.0, 0.8)
    (noted,) = body["recipe"]["controls"]
    assert noted["name"] == "layout" and noted["digest"].startswith("sha256:")
    again = able.generate(recipe=body["recipe"]).json()
    assert again["recipe_hash"] == body["recipe_hash"]
    assert seen_by_worker(able)["controls"] == [control]


def test_the_adapters_own_scale_counts_where_none_is_given(able: Any) -> None:
    able.generate(prompt="a cat", controlnets=[{"id": "layout", "image": url_of(MAP)}])
    assert seen_by_worker(able)["controls"][0]["scale"] == 1.0


def test_every_route_takes_maps(able: Any) -> None:
    http = able.http()
    edit = {"prompt": "a cat", "controlnets": json.dumps([CONTROL])}
    assert http.post("/v1/images/edits", data=edit, files={"image": sample()}).status_code == 200
    assert len(seen_by_worker(able)["controls"]) == 1
    job = {"type": "image.generate", "input": {"prompt": "a cat", "controlnets": [CONTROL]}}
    made = http.post("/v1/jobs", json=job, headers={"prefer": "wait=60"})
    assert made.json()["input"]["controlnets"][0]["id"] == "layout"
    assert len(seen_by_worker(able)["controls"]) == 1


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"controlnets": [{"id": "nobody", "image": url_of(MAP)}]}, 404, "controlnets[0].id"),
        ({"controlnets": [{"id": "stripes", "image": url_of(MAP)}]}, 400, "controlnets[0].id"),
        ({"loras": [{"id": "layout"}]}, 400, "loras[0].id"),
        ({"controlnets": [CONTROL | {"scale": 3}]}, 400, "controlnets[0].scale"),
        ({"controlnets": [CONTROL | {"start": 0.9}]}, 400, "controlnets[0].start"),
        ({"controlnets": [CONTROL | {"image": "nowhere"}]}, 400, "controlnets[0].image.image_url"),
        ({"controlnets": [CONTROL] * 5}, 400, "controlnets"),
        ({"ip_adapters": [{"id": "x"}]}, 400, "ip_adapters"),
        (
            {"reference_images": [url_of(MAP) | {"role": "mood"}]},
            400,
            "reference_images[0].role",
        ),
        (
            {"reference_images": [url_of(MAP) | {"start": 0.9, "end": 0.1}]},
            400,
            "reference_images[0].start",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    able: Any, more: dict[str, Any], status: int, param: str
) -> None:
    answer = able.generate(prompt="a cat", **more)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_roles_set_what_is_not_said(able: Any) -> None:
    given = [
        url_of(MAP) | {"role": "style"},
        url_of(MAP) | {"role": "composition", "end": 0.4, "strength": 0.5},
        url_of(MAP),
    ]
    body = able.generate(prompt="a cat", reference_images=given).json()
    style, composition, plain = seen_by_worker(able)["reference_uses"]
    assert (style["start"], style["end"], style["max_pixels"]) == (0.3, 1.0, 512 * 512)
    assert (composition["end"], composition["strength"]) == (0.4, 0.5)
    assert plain == {"role": None, "strength": 1.0, "start": 0.0, "end": 1.0, "max_pixels": None}
    assert [set(r) for r in body["recipe"]["references"]][2] == {"sha256"}
    again = able.generate(recipe=body["recipe"]).json()
    assert again["recipe_hash"] == body["recipe_hash"]
    able.generate(prompt="a cat", reference_images=given[2:])
    assert seen_by_worker(able)["reference_uses"] == []


def test_the_price_of_extras_is_told_before_anything_is_drawn(able: Any) -> None:
    before = len(able.jobs())

    def cost(**more: Any) -> dict[str, Any]:
        answer = able.http().post("/v1/images/estimates", json={"prompt": "a cat"} | more)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    plain = cost()
    assert (plain["text_tokens"], plain["image_tokens"], plain["relative_cost"]) == (32, 64, 1.0)
    assert plain["token_steps"] == 96 * 20 and cost(n=3)["token_steps"] == 3 * 96 * 20
    whole = cost(reference_images=[url_of(MAP)])
    assert whole["relative_cost"] == pytest.approx(1 + 64 / 96, abs=1e-3)
    half = cost(reference_images=[url_of(MAP) | {"end": 0.5}])
    assert half["references"] == [{"index": 0, "role": None, "tokens": 64, "steps": 10}]
    small = cost(reference_images=[url_of(MAP) | {"max_pixels": 64 * 64}])
    assert small["references"][0]["tokens"] == 16
    followed = cost(controlnets=[CONTROL])
    assert followed["controlnets"] == [{"index": 0, "id": "layout", "steps": 16}]
    assert 1.1 < followed["relative_cost"] < 1.25
    assert len(able.jobs()) == before

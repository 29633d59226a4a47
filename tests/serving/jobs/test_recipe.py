"""Recipes: canonical, signed into files and read back, whatever they say."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calotype.serving.images.encode import encode_image
from calotype.serving.images.recipe_metadata import embed_recipe, extract_recipe
from calotype.serving.jobs.recipe import (
    canonical,
    changes,
    image_recipe,
    make_recipe,
    recipe_hash,
)

PIXELS = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
FILES = {kind: encode_image(PIXELS, kind, 90) for kind in ("png", "jpeg", "webp")}

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
recipes = st.dictionaries(
    text,
    st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4)
    ),
    max_size=8,
)


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=30, deadline=None)
@given(recipe=recipes)
def test_a_recipe_in_a_file_is_read_back_and_no_pixel_changes(
    kind: str, recipe: dict[str, Any]
) -> None:
    data = FILES[kind]
    signed = embed_recipe(data, recipe)
    found = extract_recipe(signed)
    assert found is not None and canonical(found) == canonical(recipe)
    before, after = (np.asarray(Image.open(io.BytesIO(file))) for file in (data, signed))
    assert (before == after).all()


@settings(max_examples=100, deadline=None)
@given(noise=st.binary(max_size=300), cut=st.integers(0, 400), kind=st.sampled_from(sorted(FILES)))
def test_a_damaged_file_has_no_recipe_and_harms_nobody(noise: bytes, cut: int, kind: str) -> None:
    signed = embed_recipe(FILES[kind], {"version": 1})
    for data in (noise, signed[:cut] + noise, signed[:cut]):
        assert extract_recipe(data) in (None, {"version": 1})


def test_a_recipe_that_is_too_long_for_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="60000 bytes"):
        embed_recipe(FILES["jpeg"], {"prompt": "x" * 70_000})
    told = image_recipe({"seed": 1, "n": 1, "prompt": "x" * 70_000}, 0, True)
    assert "prompt" not in told and "recipe_hash" in told
    with pytest.raises(ValueError, match="not a png"):
        embed_recipe(b"GIF89a", {})


@settings(max_examples=100, deadline=None)
@given(recipe=recipes)
def test_the_hash_is_of_the_content_and_not_of_its_order(recipe: dict[str, Any]) -> None:
    turned = dict(reversed(recipe.items()))
    assert recipe_hash(turned) == recipe_hash(recipe)
    assert changes(recipe, turned) == []


REQUEST = {
    "id": "job_1", "prompt": "a dog", "size": "128x128", "rendered_size": "128x128", "seed": 7,
    "n": 1, "steps": 20, "guidance_scale": 2.5, "sampler": "flow-euler", "loras": [],
}  # fmt: skip


def make(**more: Any) -> dict[str, Any]:
    return make_recipe(
        REQUEST | more,
        operation="generate",
        model={"name": "shapes", "digest": "sha256:1"},
        adapter_digests={"stripes": "sha256:2"},
        output={"format": "png", "compression": 100},
    )


def test_what_does_not_change_the_picture_does_not_change_the_recipe() -> None:
    plain = recipe_hash(make())
    for same in (
        {"id": "job_2"}, {"priority": 1}, {"preview_every": 5}, {"tenant": "a"}, {"weight": 2.0},
        {"checkpoint_every": 4}, {"loras": [{"id": "stripes", "scale": 0}]}, {"sigmas": []},
        {"negative_prompt": None}, {"a_parameter_of_the_future": None},
    ):  # fmt: skip
        assert recipe_hash(make(**same)) == plain, same


def test_what_changes_the_picture_changes_the_recipe() -> None:
    hashes = {
        recipe_hash(make(**more))
        for more in (
            {}, {"prompt": "a cat"}, {"seed": 8}, {"steps": 21}, {"size": "64x64"}, {"n": 2},
            {"guidance_scale": 3}, {"sampler": "flow-heun"}, {"negative_prompt": "x"},
            {"loras": [{"id": "stripes", "scale": 1}]}, {"sigmas": [1.0, 0.5]},
            {"image": "team/ab/abc.png"}, {"mask": "team/ab/abc.png"},
            {"references": ["team/ab/abc.png"]}, {"strength": 0.5},
        )
    }  # fmt: skip
    assert len(hashes) == 15


def test_a_golden_recipe_keeps_its_hash() -> None:
    golden = {"version": 1, "prompt": "ä 🦊", "seed": 7, "scale": 0.8, "model": {"name": "shapes"}}
    assert canonical(golden) == (
        '{"model":{"name":"shapes"},"prompt":"ä 🦊","scale":0.8,"seed":7,"version":1}'
    )
    assert recipe_hash(golden)[:16] == "47429c756a309884"

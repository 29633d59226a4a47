"""Maps: given, fitted, or made of a picture by a preprocessor."""

from __future__ import annotations

import importlib.metadata
import io

import numpy as np
import pytest
from PIL import Image
from samples.controls import png

from calotype.serving.core import conditions
from calotype.serving.core.conditions import ControlRef
from calotype.serving.core.errors import EngineError, InvalidRequest
from calotype.serving.core.request import ImageSize
from calotype.serving.engine.control import preprocessors
from calotype.serving.engine.control.preprocessors import canny, read_map, use_maps


def square(side=64, inner=slice(16, 48)):
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[inner, inner] = 255
    return pixels


def inverted(pixels):
    return 255 - pixels


def grey(pixels):
    return pixels[:, :, 0]


def broken(pixels):
    raise RuntimeError("no weights")


@pytest.fixture
def installed(monkeypatch):
    """An installed package with three preprocessors."""
    names = ("inverted", "grey", "broken")
    group = conditions.PREPROCESSOR_ENTRY_POINTS
    entries = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, f"{__name__}:{name}", group) for name in names
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **kw: entries.select(**kw))
    preprocessors._installed.cache_clear()
    yield
    preprocessors._installed.cache_clear()


def test_canny_draws_the_outline_one_pixel_wide():
    edges = canny(square())
    assert edges.shape == (64, 64, 3) and set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges[:, :, 0])
    assert abs(int(rows.min()) - 16) <= 1 and abs(int(columns.max()) - 47) <= 1
    assert not edges[20:44, 20:44].any()
    assert 100 < len(rows) < 160


def test_a_map_of_the_same_proportions_is_fitted_and_that_is_told(make_request):
    request = make_request(controls=(ControlRef("c", "p", "canny"), ControlRef("c", "q")))
    files = {"p": png(square(128, slice(32, 96))), "q": png(square())}
    _, _, used = use_maps(request, files)
    assert used[0].fitted == ImageSize(128, 128) and used[1].fitted is None


def test_made_maps_are_named_by_what_they_show_and_are_used_as_they_are(make_request):
    request = make_request(controls=(ControlRef("c", "p", "canny", 0.5, 0.1, 0.9),))
    files = {"p": png(square())}
    made, kept, used = use_maps(request, files)
    assert made.controls == (ControlRef("c", used[0].name, "none", 0.5, 0.1, 0.9),)
    assert kept["p"] == files["p"]
    pixels, _ = read_map(made.controls[0], kept, request.rendered_size, 0)
    np.testing.assert_array_equal(pixels, canny(square()))
    again, _, _ = use_maps(request, files)
    assert again == made
    assert Image.open(io.BytesIO(used[0].data)).size == (64, 64)


def test_an_installed_preprocessor_is_found_by_its_name(installed, make_request):
    pixels, _ = read_map(
        ControlRef("c", "p", "inverted"), {"p": png(square())}, ImageSize(64, 64), 0
    )
    np.testing.assert_array_equal(pixels, 255 - square())
    assert set(conditions.map_types()) == {"none", "canny", "inverted", "grey", "broken"}


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("depth", InvalidRequest, "nothing is installed.*type 'none'.*entry point 'depth'.*canny"),
        ("grey", EngineError, r"made a map of uint8 \[64, 64\] instead of uint8 \[64, 64, 3\]"),
        ("broken", EngineError, "RuntimeError: no weights"),
    ],
)
def test_what_is_missing_or_fails_says_what_to_write_instead(installed, kind, error, words):
    with pytest.raises(error, match=words) as caught:
        read_map(ControlRef("c", "p", kind), {"p": png(square())}, ImageSize(64, 64), 1)
    assert caught.value.param == "controlnets[1].type"

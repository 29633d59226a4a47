"""How references are looked at: windows, strength, pixel budget."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from calotype.serving.core.conditions import ReferenceUse
from calotype.serving.core.errors import InvalidRequest

USUAL = ReferenceUse()


def scene(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


FILES = {"a": scene(64, 64, 1), "b": scene(96, 64, 2), "large": scene(256, 128, 3)}


@pytest.fixture
def draw(new_engine, make_request):
    def run(**asked):
        engine = new_engine()
        for name, keywords in asked.items():
            engine.add(make_request(name, **keywords), files=FILES)
        drawn = engine.run()
        assert all(drawn.image(name) is not None for name in asked)
        return {name: drawn.latents[name, 0] for name in asked}

    return run


def test_the_usual_use_is_the_same_to_the_bit_as_none(draw):
    found = draw(
        plain={"references": ("a", "b")},
        usual={"references": ("a", "b"), "reference_uses": (USUAL, USUAL)},
    )
    assert torch.equal(found["plain"], found["usual"])


def test_what_is_never_looked_at_changes_no_bit(draw):
    found = draw(
        none={},
        never={"references": ("a",), "reference_uses": (ReferenceUse(end=0.0),)},
        only={"references": ("b",)},
        second={"references": ("b", "a"), "reference_uses": (USUAL, ReferenceUse(start=1.0))},
    )
    assert torch.equal(found["none"], found["never"])
    assert torch.equal(found["only"], found["second"])


def test_windows_and_strengths_stay_the_same_to_the_bit_in_company(draw):
    two = {"references": ("a", "b")}
    asked = {
        "early": two | {"reference_uses": (ReferenceUse(end=0.5), USUAL)},
        "late": two | {"reference_uses": (USUAL, ReferenceUse(start=0.5))},
        "weak": two | {"reference_uses": (ReferenceUse(strength=0.5), USUAL)},
        "plain": two,
        "cached": two | {"reference_uses": (ReferenceUse(end=0.5), USUAL), "step_cache": 0.99},
    }
    together = draw(**asked)
    for name, keywords in asked.items():
        assert torch.equal(together[name], draw(**{name: keywords})[name]), name
    for name in ("early", "late", "weak"):
        assert (together[name] - together["plain"]).abs().max() > 1e-3


def test_strength_goes_from_none_to_more(draw):
    def strong(value):
        return {"references": ("a",), "reference_uses": (ReferenceUse(strength=value),)}

    found = draw(none={}, nearly=strong(1e-6), one=strong(1.0), two=strong(2.0))
    torch.testing.assert_close(found["nearly"], found["none"], atol=1e-3, rtol=0)
    assert (found["one"] - found["none"]).abs().max() > 1e-2
    assert (found["two"] - found["one"]).abs().max() > 1e-3


def test_a_budget_bounds_the_tokens(new_engine, make_request):
    engine = new_engine()
    uses = (ReferenceUse(max_pixels=64 * 64),)
    engine.add(make_request(references=("large",), reference_uses=uses), files=FILES)
    bucket = next(iter(engine._arrived)).bucket
    assert bucket.references == ((2, 5),), "256x128 pixels at the scale of 64x64: 90x45"
    assert engine.run().image("r") is not None


def test_a_window_gives_its_tokens_back(new_engine, make_request):
    """How many tokens the forward pass sees, step by step."""
    engine, seen = new_engine(), []
    run = engine._denoiser._forward

    def counted(hidden, *rest, **more):
        seen.append(hidden.shape[1])
        return run(hidden, *rest, **more)

    engine._denoiser._forward = counted
    uses = (ReferenceUse(end=0.5),)
    engine.add(make_request(references=("a",), reference_uses=uses, steps=4), files=FILES)
    engine.run()
    assert seen == [32, 32, 16, 16]


@pytest.mark.parametrize(
    ("uses", "words"),
    [
        ((ReferenceUse(strength=0.0),), "strength is 0.*Leave the picture out"),
        ((ReferenceUse(strength=float("nan")),), "strength is nan"),
        ((ReferenceUse(start=0.8, end=0.2),), "0 <= start <= end <= 1"),
        ((USUAL, USUAL), "one for each"),
    ],
)
def test_uses_out_of_range_are_refused(engine, make_request, uses, words):
    with pytest.raises(InvalidRequest, match=words):
        engine.add(make_request(references=("a",), reference_uses=uses), files=FILES)

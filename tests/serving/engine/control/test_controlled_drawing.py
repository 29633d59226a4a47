"""Control maps in the continuous batch: what they change, and what they leave as it is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from calotype.serving.core.conditions import ControlRef
from calotype.serving.core.errors import EngineError, InvalidRequest, NotFound
from calotype.serving.core.request import AdapterRef, Checkpoint
from calotype.serving.engine.control.contexts import ControlContexts
from calotype.serving.engine.control.control_store import ControlStore
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.testing.models import save_random_lora

LINES = ControlRef("lines", "a")


@pytest.fixture
def draw(new_engine, controls, files, make_request):
    """Latents of requests drawn together; each is the keywords of a request."""

    def run(*asked, **engine):
        one = new_engine(controls=controls, **engine)
        for i, keywords in enumerate(asked):
            one.add(make_request(f"r{i}", **keywords), files=files)
        drawn = one.run()
        return [drawn.image(f"r{i}") is not None and drawn.latents[f"r{i}", 0]
                for i in range(len(asked))]  # fmt: skip

    return run


def same(a, b):
    return torch.equal(a, b)


def test_a_map_changes_the_image_and_another_map_changes_it_otherwise(draw):
    plain, first, second, other = draw(
        {},
        {"controls": (LINES,)},
        {"controls": (dataclasses.replace(LINES, image="b"),)},
        {"controls": (dataclasses.replace(LINES, name="depths"),)},
    )
    for a, b in itertools.combinations([plain, first, second, other], 2):
        assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize(
    "control",
    [
        dataclasses.replace(LINES, scale=0.0),
        dataclasses.replace(LINES, end=0.0),
        dataclasses.replace(LINES, start=1.0),
        ControlRef("fresh", "a", scale=2.0),
    ],
    ids=["scale 0", "end 0", "start 1", "never trained"],
)
def test_what_does_not_act_leaves_the_image_to_the_bit(draw, control):
    plain, found = draw({}, {"controls": (control,)})
    assert same(plain, found)


def test_company_with_controls_changes_no_bit_of_anybody(draw):
    asked = [
        {},
        {"controls": (LINES,)},
        {"controls": (LINES, ControlRef("depths", "b", scale=0.4)), "seed": 8},
        {"controls": (ControlRef("depths", "b", end=0.5),), "steps": 3},
        {"controls": (LINES,), "negative_prompt": "a green ring"},
        {"references": ("b",), "controls": (LINES,)},
        {"size": (96, 64), "controls": (ControlRef("lines", "wide"),)},
    ]
    together = draw(*asked)
    for keywords, found in zip(asked, together, strict=True):
        (alone,) = draw(keywords)
        assert same(alone, found), keywords


def test_two_at_half_a_scale_are_one_to_the_bit(draw):
    half = dataclasses.replace(LINES, scale=0.5)
    (one,) = draw({"controls": (LINES,)})
    (two,) = draw({"controls": (half, half)})
    assert same(one, two)


def test_controls_of_several_branches_are_summed_in_any_order(draw):
    both = (LINES, ControlRef("depths", "b", scale=0.7))
    forth, back, one = draw({"controls": both}, {"controls": both[::-1]}, {"controls": both[:1]})
    torch.testing.assert_close(forth, back, atol=1e-4, rtol=0)
    assert (forth - one).abs().max() > 1e-2


def test_a_window_acts_in_its_steps_only(new_engine, controls, files, make_request):
    """Step by step: the latents part from the plain ones where the window begins."""

    def course(*own):
        one = new_engine(controls=controls)
        one.add(make_request(steps=4, controls=own), files=files)
        seen = []
        while one.has_work:
            one.step()
            seen += [s.rows[0].latents.clone() for s in one._states.values()]
        return seen

    plain, late = course(), course(dataclasses.replace(LINES, start=0.5))
    early = course(dataclasses.replace(LINES, end=0.5))
    whole = course(LINES)
    assert [same(a, b) for a, b in zip(plain, late, strict=True)] == [True, True, False]
    assert [same(a, b) for a, b in zip(whole, early, strict=True)] == [True, True, False]


def test_a_map_is_encoded_once(new_engine, controls, files, make_request):
    engine = new_engine(controls=controls)
    for name in ("one", "two"):
        engine.add(make_request(name, controls=(LINES,), n=2), files=files)
    engine.add(make_request("three", controls=(LINES, LINES)), files=files)
    engine.run()
    contexts: ControlContexts = engine._admission._contexts
    assert contexts.encoded == 1


def test_the_cache_of_maps_keeps_to_its_bytes(new_engine, components):
    engine = new_engine()
    contexts = ControlContexts(
        engine._admission._conditioner, components.denoiser.config, kept_bytes=4000
    )
    for seed in (1, 2, 1):
        contexts.of(np.full((64, 64, 3), seed, np.uint8))
    assert contexts.encoded == 3, "one map of 16 tokens and 36 channels takes 2,304 bytes"


def test_adapters_and_controls_go_together(
    new_engine, controls, files, make_request, components, model_folder, tmp_path
):
    adapters = AdapterStore(components.denoiser)
    adapters.load("lora", save_random_lora(model_folder, tmp_path / "a.safetensors", 4), wait=60)
    engine = new_engine(controls=controls, adapters=adapters)
    stack = (AdapterRef("lora", 1.0),)
    for name, own, loras in (("both", (LINES,), stack), ("c", (LINES,), ()), ("l", (), stack)):
        engine.add(make_request(name, controls=own, adapters=loras), files=files)
    drawn = engine.run()
    for other in ("c", "l"):
        difference = drawn.latents["both", 0] - drawn.latents[other, 0]
        assert difference.abs().max() > 1e-2
    adapters.layers.remove()


def test_a_checkpoint_goes_on_with_its_map_to_the_bit(new_engine, controls, files, make_request):
    asked = make_request(steps=6, controls=(LINES,), checkpoint_every=3)
    alone = new_engine(controls=controls)
    alone.add(asked, files=files)
    left = alone.run().of(Checkpoint, "r")[0]
    second = new_engine(controls=controls)
    second.add(asked, files=files, checkpoint=left.data)
    second.run()
    assert same(second.drawn.latents["r", 0], alone.drawn.latents["r", 0])
    other = dataclasses.replace(asked, controls=(dataclasses.replace(LINES, scale=0.5),))
    with pytest.raises(InvalidRequest, match="another request"):
        second.add(dataclasses.replace(other, id="r2"), files=files, checkpoint=left.data)


def test_the_step_cache_sees_what_a_map_adds(new_engine, controls, files, make_request):
    """With a threshold that nothing meets the images are the same to the bit."""
    engine = new_engine(controls=controls)
    engine.add(make_request("plain", controls=(LINES,)), files=files)
    engine.add(make_request("cached", controls=(LINES,), step_cache=1e-9), files=files)
    engine.add(make_request("reused", controls=(LINES,), step_cache=0.99), files=files)
    drawn = engine.run()
    assert same(drawn.latents["plain", 0], drawn.latents["cached", 0])
    assert drawn.ending("reused").skipped > 0


@pytest.mark.parametrize(
    ("control", "error", "param", "words"),
    [
        (ControlRef("nobody", "a"), NotFound, "controlnets", "'nobody'"),
        (ControlRef("lines", "none"), InvalidRequest, "controlnets[0].image", "was not given"),
        (ControlRef("lines", "wide"), InvalidRequest, "controlnets[0].image", "96x64.*64x64"),
        (ControlRef("lines", "a", "depth"), InvalidRequest, "controlnets[0].type", "type 'none'"),
        (ControlRef("lines", "a", scale=2.5), InvalidRequest, "controlnets[0].scale", "0 to 2"),
        (ControlRef("lines", "a", end=-0.4), InvalidRequest, "controlnets[0].start", "<="),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_before_anything_starts(
    new_engine, controls, files, make_request, control, error, param, words
):
    engine = new_engine(controls=controls)
    with pytest.raises(error, match=words) as caught:
        engine.add(make_request(controls=(control,)), files=files)
    assert caught.value.param == param
    assert not engine.has_work


def test_too_many_maps_are_refused(engine, make_request, files):
    with pytest.raises(InvalidRequest, match="at most 4"):
        engine.add(make_request(controls=(LINES,) * 5), files=files)


def test_a_damaged_file_fails_the_requests_that_name_it(
    components, new_engine, make_request, files, tmp_path
):
    (tmp_path / "bad.safetensors").write_bytes(b"no such thing")
    store = ControlStore(components.denoiser)
    store.load("bad", tmp_path / "bad.safetensors")
    engine = new_engine(controls=store)
    engine.add(make_request("r", controls=(ControlRef("bad", "a"),)), files=files)
    engine.add(make_request("good"), files=files)
    drawn = engine.run()
    error = drawn.ending("r").error
    assert isinstance(error, EngineError) and "'bad'" in error.message
    assert str(tmp_path) not in error.message
    assert drawn.image("good") is not None

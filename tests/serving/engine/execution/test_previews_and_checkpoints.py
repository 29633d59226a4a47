"""Previews, tiles, checkpoints: what is seen of a request before it ends."""

from __future__ import annotations

import dataclasses
import io
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

import calotype.serving
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import (
    SAMPLER_NAMES,
    AdapterRef,
    Checkpoint,
    Failed,
    Finished,
    Preview,
    Progress,
)
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.conditioning import Conditioner
from calotype.serving.engine.model.decoder import Decoder
from calotype.serving.engine.model.latents import TokenGrid
from calotype.serving.testing.models import save_random_lora, save_tiny_flux2

SHAPES = pathlib.Path(calotype.serving.__file__).parent / "weights" / "embedded" / "shapes"


def test_previews_come_after_whole_steps(engine, make_request):
    engine.add(make_request("euler", steps=6, preview_every=2))
    engine.add(make_request("heun", steps=6, preview_every=2, sampler="flow-heun", n=2))
    drawn = engine.run()
    assert [e.step for e in drawn.of(Preview, "euler")] == [2, 4]
    assert [(e.step, e.index) for e in drawn.of(Preview, "heun")] == [
        (2, 0), (2, 1), (4, 0), (4, 1),
    ]  # fmt: skip
    for event in drawn.of(Preview, "heun"):
        before = drawn.events[: drawn.events.index(event)]
        done = [e.step for e in before if isinstance(e, Progress) and e.request_id == "heun"]
        assert max(done, default=0) == event.step - 1


@pytest.mark.parametrize(("side", "shape"), [(256, (64, 160)), (80, (32, 80)), (1, (8, 8))])
def test_previews_are_no_larger_than_asked(new_engine, make_request, side, shape):
    engine = new_engine(preview_side=side)
    engine.add(make_request(size=(160, 64), steps=2, preview_every=1))
    (preview,) = engine.run().of(Preview, "r")
    assert preview.pixels.dtype == np.uint8
    assert preview.pixels.shape[:2] == shape


def test_a_small_preview_looks_like_the_image_made_small(new_engine, make_request):
    components = load_components(SHAPES)
    engine = new_engine(components, preview_side=64)
    engine.add(
        make_request(
            prompt="a large red circle on a blue background", size=(128, 128), steps=12,
            preview_every=11, guidance=2.5,
        )
    )  # fmt: skip
    drawn = engine.run()
    (preview,) = drawn.of(Preview, "r")
    (image,) = drawn.ending("r").images
    small = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BOX))
    assert preview.pixels.shape == (64, 64, 3)
    far = np.abs(preview.pixels.astype(int) - small).mean()
    turned = np.abs(preview.pixels.astype(int) - small[:, :, ::-1]).mean()
    assert far < 20 < turned


def test_a_preview_that_fails_costs_only_itself(engine, make_request, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._decoder, "preview", fail)
    engine.add(make_request(steps=3, preview_every=1))
    drawn = engine.run()
    assert isinstance(drawn.ending("r"), Finished)
    assert drawn.of(Preview, "r") == []


def test_tiles_are_tried_when_memory_runs_out(components, make_request, monkeypatch):
    decode, tried = components.vae.decode, []

    def in_tiles_only(latents, *, tiled):
        tried.append(tiled)
        if not tiled:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, tiled=tiled)

    monkeypatch.setattr(components.vae, "decode", in_tiles_only)
    engine = Engine(components)
    engine.add(make_request(steps=1))
    events = [event for _ in range(3) for event in engine.step()]
    assert tried == [False, True]
    assert isinstance(events[-1], Finished)


def test_large_images_are_decoded_in_tiles():
    vae = load_components(SHAPES, parts=("vae",)).vae
    image = np.asarray(Image.linear_gradient("L").resize((320, 320)).convert("RGB"))
    latents = Conditioner(vae, torch.float32, 16).tokens(image).unsqueeze(0)
    grid = TokenGrid(20, 20)
    whole = Decoder(vae).decode_float(latents, grid)
    tiled = Decoder(vae, tile_above=320 * 320 - 1).decode_float(latents, grid)
    assert whole.shape == tiled.shape == (1, 320, 320, 3)
    # Group norms see other pixels in a tile than in the whole: alike, not the same.
    assert 0 < np.abs(whole - tiled).mean() < 0.2 * np.abs(whole - whole[:, ::-1]).mean()


@pytest.fixture(scope="module")
def lora(model_folder, tmp_path_factory):
    return save_random_lora(model_folder, tmp_path_factory.mktemp("l") / "a.safetensors", 4)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_resumed_is_the_same_image_to_the_bit(new_engine, make_request, sampler):
    request = make_request(steps=6, sampler=sampler, n=2, negative_prompt="a star")
    whole = new_engine()
    whole.add(dataclasses.replace(request, checkpoint_every=2))
    drawn = whole.run()
    saved = drawn.of(Checkpoint, "r")
    assert [event.step for event in saved] == [2, 4]
    for event in saved:
        later = new_engine()
        later.add(dataclasses.replace(request, id="again"), checkpoint=event.data)
        resumed = later.run()
        assert [e.step for e in resumed.of(Progress, "again")] == list(range(event.step + 1, 7))
        for i in range(2):
            assert np.array_equal(resumed.image("again", i), drawn.image("r", i))
        assert resumed.ending("again").denoise_seconds > 0


def test_a_checkpoint_holds_edits_adapters_caches_and_bfloat16(
    model_folder, make_request, new_engine, lora
):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    mask = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).save(mask, "PNG")
    files = {"p": file.getvalue(), "m": mask.getvalue()}
    request = make_request(
        steps=6, image="p", mask="m", references=("p",), adapters=(AdapterRef("a", 0.5),),
        step_cache=0.5, checkpoint_every=3,
    )  # fmt: skip
    components = load_components(model_folder, precision="bfloat16")
    pictures = []
    data = None
    for _ in range(2):
        store = AdapterStore(components.denoiser)
        store.load("a", lora, wait=30)
        engine = new_engine(components, adapters=store)
        engine.add(request, files=files, checkpoint=data)
        drawn = engine.run()
        pictures.append(drawn.ending("r").images[0])
        data = data or drawn.of(Checkpoint, "r")[0].data
        store.layers.remove()
    assert np.array_equal(*pictures)


def test_a_checkpoint_on_demand_of_some_images_finished(new_engine, make_request):
    request = make_request(steps=2, n=3)
    engine = new_engine(max_batch_rows=1)
    engine.add(request)
    engine.checkpoint("r")
    engine.checkpoint("nobody")
    while not engine.drawn.floats:
        engine.step()
    engine.checkpoint("r")
    engine.step()
    *_, event = engine.drawn.of(Checkpoint, "r")
    engine.abort("r")
    engine.run()
    later = new_engine(max_batch_rows=1)
    later.add(request, checkpoint=event.data)
    drawn = later.run()
    assert len(later.batches) == 3, "what was done is not done again"
    plain = new_engine(max_batch_rows=1)
    plain.add(request)
    for ours, theirs in zip(drawn.ending("r").images, plain.run().ending("r").images, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.fixture(scope="module")
def taken(components, make_request):
    engine = Engine(components)
    engine.add(make_request(steps=4, checkpoint_every=2))
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Checkpoint):
                return event.data
    raise AssertionError("no checkpoint was taken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is damaged"),
        (lambda data: data[:-20], "is damaged"),
        (lambda data: b"PK\x03\x04" + data[4:], "is damaged"),
        (
            lambda data: data.replace(b'\\"version\\": \\"1\\"', b'\\"version\\": \\"9\\"'),
            "version '9'",
        ),
        (lambda data: data.replace(b'\\"done\\": [2]', b'\\"done\\": [4]'), "is damaged"),
        (lambda data: data.replace(b'\\"done\\": [2]', b'\\"done\\": [9]'), "is damaged"),
        (lambda data: save(load(data)), "is damaged"),
    ],
    ids=["empty", "cut", "zip", "version", "done", "too many", "no head"],
)
def test_a_damaged_checkpoint_is_refused(new_engine, make_request, taken, change, message):
    engine = new_engine()
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.add(make_request(steps=4), checkpoint=change(taken))
    assert caught.value.param == "checkpoint" and not engine.has_work


def test_a_checkpoint_of_something_else_is_refused(new_engine, make_request, taken, tmp_path):
    for other in ({"seed": 8}, {"steps": 5}, {"prompt": "a star"}, {"n": 2}, {"guidance": 1.0}):
        with pytest.raises(InvalidRequest, match="of another request or with another model"):
            new_engine().add(make_request(**{"steps": 4, **other}), checkpoint=taken)
    model = load_components(save_tiny_flux2(tmp_path / "other", seed=3))
    with pytest.raises(InvalidRequest, match="of another request or with another model"):
        new_engine(model).add(make_request(steps=4), checkpoint=taken)
    new_engine().add(make_request("other-name", steps=4, priority=3), checkpoint=taken)


def test_a_changed_adapter_ends_a_resumed_request(
    components, model_folder, new_engine, make_request, tmp_path
):
    path = save_random_lora(model_folder, tmp_path / "a.safetensors", 4, seed=1)
    store = AdapterStore(components.denoiser)
    store.load("a", path, wait=30)
    request = make_request(steps=4, adapters=(AdapterRef("a"),), checkpoint_every=2)
    engine = new_engine(adapters=store)
    engine.add(request)
    data = engine.run().of(Checkpoint, "r")[0].data
    save_random_lora(model_folder, tmp_path / "b", 4, seed=2).replace(path)
    store.load("a", path, wait=30)
    later = new_engine(adapters=store)
    later.add(request, checkpoint=data)
    ending = later.run().ending("r")
    assert isinstance(ending, Failed) and ending.error.param == "checkpoint"
    assert "another revision of the adapter 'a'" in ending.error.message
    store.layers.remove()

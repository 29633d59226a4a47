"""Given images: references, image-to-image, inpainting and outpainting, against diffusers."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
import torch
from PIL import Image

from calotype.serving.core.errors import InvalidRequest, OutOfMemory
from calotype.serving.core.request import ImageSize, Margins, Progress
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.input_images import restore_outside
from calotype.serving.images.encode import encode_image
from calotype.serving.testing.models import MAX_SEQUENCE_LENGTH, OUT_LAYERS, save_tiny_flux2

CLOSE = {"atol": 1e-4, "rtol": 0}


def scene(width, height, seed=0):
    """An image with soft and hard parts."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def mask_of(width, height, box):
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    "sizes",
    [[(64, 64)], [(100, 90), (64, 128)], [(1100, 1000)], [(64, 64)] * 10],
    ids=["one", "uneven", "large", "ten"],
)
def test_references_equal_the_pipelines(engine, oracle, draw_with, make_request, sizes):
    images = [scene(*size, seed=i) for i, size in enumerate(sizes)]
    files = {str(i): png(picture) for i, picture in enumerate(images)}
    engine.add(make_request(references=tuple(files), steps=2), files=files)
    engine.add(make_request("plain", steps=2))
    drawn = engine.run()
    theirs = draw_with(oracle, image=images, steps=2)
    np.testing.assert_allclose(drawn.image("r"), theirs, **CLOSE)
    assert np.abs(drawn.image("r") - drawn.image("plain")).max() > 1e-3


def test_requests_with_references_of_one_layout_share_steps(engine, new_engine, make_request):
    files = {"a": png(scene(64, 64, 1)), "b": png(scene(70, 79, 2)), "c": png(scene(96, 64, 3))}
    for name in files:
        engine.add(make_request(name, references=(name,), n=2), files=files)
    drawn = engine.run()
    assert sorted(engine.batches) == [2] * 4 + [4] * 4, "a and b have one layout, c another"
    for name in files:
        alone = new_engine()
        alone.add(make_request(name, references=(name,), n=2), files=files)
        np.testing.assert_allclose(drawn.image(name, 1), alone.run().image(name, 1), **CLOSE)
    assert np.abs(drawn.image("a") - drawn.image("b")).max() > 1e-3


@pytest.fixture(scope="module")
def klein(tmp_path_factory, load_oracle):
    from diffusers import Flux2KleinInpaintPipeline

    folder = save_tiny_flux2(tmp_path_factory.mktemp("klein") / "klein", klein=True)
    parts = load_oracle(folder).components
    pipeline = Flux2KleinInpaintPipeline(**parts, is_distilled=True)
    pipeline.set_progress_bar_config(disable=True)
    return load_components(folder), pipeline


@torch.no_grad()
def inpainted(pipeline, picture, mask, strength, steps=5, seed=7):
    return pipeline(
        prompt="a red circle on a blue background",
        image=picture,
        mask_image=mask,
        strength=strength,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        text_encoder_out_layers=OUT_LAYERS,
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.3])
def test_inpainting_equals_diffusers_inpainting_pipeline(klein, new_engine, make_request, strength):
    components, pipeline = klein
    picture, mask = scene(96, 64), mask_of(96, 64, (32, 16, 80, 48))
    engine = new_engine(components)
    # The pipeline shows the image to the denoiser as a reference, too.
    files = {"picture": png(picture), "mask": png(mask)}
    engine.add(
        make_request(
            size=(96, 64), steps=5, image="picture", mask="mask", references=("picture",),
            strength=strength,
        ),
        files=files,
    )  # fmt: skip
    ours = engine.run().image("r")
    np.testing.assert_allclose(ours, inpainted(pipeline, picture, mask, strength), **CLOSE)


def test_image_to_image_equals_inpainting_everything(klein, new_engine, make_request):
    components, pipeline = klein
    picture = scene(64, 64)
    engine = new_engine(components)
    engine.add(
        make_request(steps=5, image="p", references=("p",), strength=0.5), files={"p": png(picture)}
    )
    drawn = engine.run()
    theirs = inpainted(pipeline, picture, Image.new("L", (64, 64), 255), 0.5)
    np.testing.assert_allclose(drawn.image("r"), theirs, **CLOSE)
    assert [(e.step, e.steps) for e in drawn.of(Progress, "r")] == [(1, 3), (2, 3), (3, 3)]


def test_less_strength_stays_nearer_to_the_image(engine, make_request):
    files = {"p": png(scene(64, 64))}
    strengths = (0.1, 0.4, 0.7, 1.0)
    for strength in strengths:
        engine.add(make_request(str(strength), steps=10, image="p", strength=strength), files=files)
    engine.add(make_request("default", steps=10, image="p"), files=files)
    engine.add(make_request("0.8", steps=10, image="p", strength=0.8), files=files)
    drawn = engine.run()
    kept = drawn.latents["0.1", 0]
    far = [float((drawn.latents[str(s), 0] - kept).abs().mean()) for s in strengths]
    assert far == sorted(far) and far[1] > 0
    assert np.array_equal(drawn.image("default"), drawn.image("0.8"))


@pytest.mark.parametrize("sampler", ["flow-euler", "flow-heun", "flow-unipc", "flow-lcm"])
def test_pixels_outside_a_mask_are_the_same_bytes_in_the_png(engine, make_request, sampler):
    picture, mask = scene(96, 64), mask_of(96, 64, (37, 11, 61, 30))
    files = {"p": png(picture), "m": png(mask)}
    request = make_request(size=(96, 64), image="p", mask="m", n=2, sampler=sampler)
    engine.add(request, files=files)
    outside = np.asarray(mask) == 0
    for pixels in engine.run().ending("r").images:
        restore = functools.partial(restore_outside, request, files)
        file = encode_image(pixels, "png", None, restore=restore)
        seen = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        assert np.array_equal(seen[outside], np.asarray(picture)[outside])
        assert (seen[~outside] != np.asarray(picture)[~outside]).mean() > 0.5


def test_transparency_marks_what_is_drawn_anew(engine, make_request):
    picture, mask = scene(64, 64), mask_of(64, 64, (16, 16, 48, 32))
    seen = picture.convert("RGBA")
    seen.putalpha(Image.eval(mask, lambda value: 255 - value))
    # The hidden colours of transparent pixels show in neither: both start from white there.
    flat = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    engine.add(make_request("alpha", image="p", mask="p"), files={"p": png(seen)})
    engine.add(make_request("white", image="p", mask="m"), files={"p": png(flat), "m": png(mask)})
    drawn = engine.run()
    assert np.array_equal(drawn.ending("alpha").images[0], drawn.ending("white").images[0])


def test_outpainting_keeps_the_image_and_fills_the_margins(engine, make_request):
    picture = scene(50, 40)
    margins = Margins(left=20, top=8, right=26, bottom=16)
    engine.add(make_request(size=(96, 64), image="p", expand=margins), files={"p": png(picture)})
    (pixels,) = engine.run().ending("r").images
    assert np.array_equal(pixels[8:48, 20:70], np.asarray(picture))
    assert pixels[:, :20].std() > 1 and pixels[:, 70:].std() > 1


def test_image_of_another_scale_is_fitted_and_restored_after_enlarging(engine, make_request):
    picture, mask = scene(256, 192), mask_of(256, 192, (128, 64, 200, 128))
    files = {"p": png(picture), "m": png(mask)}
    request = make_request(size=(128, 96), image="p", mask="m")
    engine.add(request, files=files)
    (pixels,) = engine.run().ending("r").images
    large = np.asarray(Image.fromarray(pixels).resize((256, 192)))
    restored = restore_outside(request, files, large)
    outside = np.asarray(mask) == 0
    assert np.array_equal(restored[outside], np.asarray(picture)[outside])
    assert np.array_equal(restored[~outside], large[~outside])
    plain = make_request(references=("p",))
    assert restore_outside(plain, files, large) is large


def test_edits_and_plain_requests_share_steps(engine, new_engine, make_request):
    files = {"p": png(scene(64, 64)), "m": png(mask_of(64, 64, (0, 0, 32, 64)))}
    asked = {
        "edit": make_request("edit", image="p", mask="m", sampler="flow-dpmpp-2m"),
        "plain": make_request("plain"),
        "noised": make_request("noised", image="p", strength=0.5, negative_prompt="a star"),
    }
    for request in asked.values():
        engine.add(request, files=files)
    together = engine.run()
    assert engine.batches[0] == 3
    for name, request in asked.items():
        alone = new_engine()
        alone.add(request, files=files)
        np.testing.assert_allclose(together.image(name), alone.run().image(name), **CLOSE)


def test_an_image_that_cannot_be_encoded_fails_its_request_alone(engine, make_request, monkeypatch):
    encode = engine._admission._conditioner.encode

    def fail_once(inputs):
        monkeypatch.setattr(engine._admission._conditioner, "encode", encode)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._admission._conditioner, "encode", fail_once)
    for name in ("a", "b"):
        engine.add(make_request(name, references=("p",)), files={"p": png(scene(64, 64))})
    drawn = engine.run()
    assert isinstance(drawn.ending("a").error, OutOfMemory)
    drawn.image("b")


P = {"p": png(scene(64, 64)), "m": png(mask_of(64, 64, (0, 0, 32, 64)))}


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        ({"image": "gone"}, "image", "names 'gone', which was not given"),
        ({"references": ("p", "gone")}, "references[1]", "was not given"),
        ({"references": ("p",) * 11}, "references", "at most 10 pictures; got 11"),
        ({"mask": "m"}, "mask", "needs an image"),
        ({"strength": 0.5}, "strength", "needs an image"),
        ({"expand": Margins(8)}, "expand", "needs an image"),
        ({"image": "p", "strength": 0.0}, "strength", "above 0"),
        ({"image": "p", "strength": 1.5}, "strength", "at most 1; got 1.5"),
        ({"image": "p", "strength": float("nan")}, "strength", "above 0"),
        ({"image": "p", "expand": Margins()}, "expand", "at least one of them above 0"),
        ({"image": "p", "expand": Margins(-8, 24)}, "expand", "0 or more"),
        ({"image": "p", "expand": Margins(10**6, 10**6)}, "expand", "smaller margins"),
        ({"image": "p", "expand": Margins(right=64)}, "image", "128x64 with its margins, but"),
    ],
    ids=str,
)
def test_bad_edits_are_refused_by_field(engine, make_request, asked, field, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.add(make_request(**asked), files=P)
    assert caught.value.param == field
    assert not engine.has_work


def test_request_with_images_travels_as_json(make_request):
    request = make_request(
        image="a", mask="b", references=("c",), strength=0.4, expand=Margins(1, 2, 3, 4),
        negative_prompt="n", sigmas=(1.0, 0.5), true_guidance=2.0, tenant="t", weight=2.0,
        deadline_seconds=5.0, checkpoint_every=2, step_cache=0.1,
    )  # fmt: skip
    assert type(request).from_payload(request.to_payload()) == request
    assert ImageSize.parse(request.to_payload()["size"]) == request.size

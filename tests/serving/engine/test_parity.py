"""Our images equal those of diffusers' own Flux2Pipeline on the same folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.text_encoder import SYSTEM_MESSAGE
from calotype.serving.testing.models import MAX_SEQUENCE_LENGTH, OUT_LAYERS, save_tiny_flux2

CLOSE = {"atol": 1e-4, "rtol": 0}
PROMPTS = [
    "a red circle on a blue background",
    "",
    "zebra " * 40,
    "Ünïcode é [IMG] <s> 漢字!",
]


@pytest.mark.parametrize(
    ("size", "steps", "guidance", "seed"),
    [
        ((64, 64), 1, 3.0, 0),
        ((64, 64), 4, 1.0, 7),
        ((96, 64), 7, 5.0, 2**63 - 1),
        ((16, 160), 3, 0.0, 123),
    ],
)
def test_image_equals_the_pipelines(
    engine, oracle, draw_with, make_request, size, steps, guidance, seed
):
    engine.add(make_request(size=size, steps=steps, guidance=guidance, seed=seed))
    ours = engine.run().image("r")
    theirs = draw_with(oracle, size=size, steps=steps, guidance=guidance, seed=seed)
    assert ours.shape == (size[1], size[0], 3)
    assert theirs.std() > 0.03, "a flat picture would equal anything"
    np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_bytes_are_rounded_as_the_pipeline_rounds(engine, oracle, draw_with, make_request):
    engine.add(make_request())
    (pixels,) = engine.run().ending("r").images
    assert pixels.dtype == np.uint8
    theirs = (draw_with(oracle) * 255).round().astype(np.uint8)
    assert np.abs(pixels.astype(int) - theirs).max() <= 1
    assert (pixels != theirs).mean() < 0.001


def test_image_i_uses_seed_plus_i(engine, oracle, draw_with, make_request):
    engine.add(make_request(n=3, seed=40))
    drawn = engine.run()
    assert len(drawn.ending("r").images) == 3
    for i in range(3):
        np.testing.assert_allclose(drawn.image("r", i), draw_with(oracle, seed=40 + i), **CLOSE)


def test_fixed_shift_of_the_model_is_used(
    model_folder, tmp_path, load_oracle, draw_with, new_engine, make_request
):
    folder = tmp_path / "fixed"
    shutil.copytree(model_folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    content = json.loads(config.read_text()) | {"use_dynamic_shifting": False, "shift": 2.5}
    config.write_text(json.dumps(content))
    engine = new_engine(load_components(folder))
    engine.add(make_request())
    ours = engine.run().image("r")
    theirs = draw_with(load_oracle(folder))
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    shifted_by_size = new_engine()
    shifted_by_size.add(make_request())
    assert np.abs(shifted_by_size.run().image("r") - theirs).max() > 1e-3


def test_klein_image_equals_the_klein_pipelines(
    tmp_path, load_oracle, draw_with, new_engine, make_request
):
    folder = save_tiny_flux2(tmp_path / "klein", klein=True)
    engine = new_engine(load_components(folder))
    engine.add(make_request(steps=3))
    np.testing.assert_allclose(
        engine.run().image("r"), draw_with(load_oracle(folder), steps=3), **CLOSE
    )


def test_bfloat16_stays_near_float32(model_folder, new_engine, make_request):
    images = []
    for precision in ("float32", "bfloat16"):
        engine = new_engine(load_components(model_folder, precision=precision))
        engine.add(make_request())
        images.append(engine.run().image("r"))
        assert engine.components.denoiser.proj_out.weight.dtype == getattr(torch, precision)
    # Other noise is drawn in bfloat16, as by the pipeline; only the kind of image is comparable.
    assert np.isfinite(images[1]).all()
    assert abs(images[0].mean() - images[1].mean()) < 0.2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_equal_the_pipelines(components, oracle, prompt):
    with torch.no_grad():
        theirs = type(oracle)._get_mistral_3_small_prompt_embeds(
            oracle.text_encoder,
            oracle.tokenizer,
            prompt,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            hidden_states_layers=OUT_LAYERS,
        )[0]
    (ours,) = components.text_encoder.encode([prompt])
    assert ours.embeds.shape == (
        MAX_SEQUENCE_LENGTH,
        components.denoiser.config.joint_attention_dim,
    )
    torch.testing.assert_close(ours.embeds, theirs, atol=1e-6, rtol=0)


def test_prompts_differ_and_are_counted(components):
    short, long = components.text_encoder.encode(["a red circle", "zebra " * 40])
    assert (short.embeds - long.embeds).abs().max() > 0.1
    assert short.token_count < MAX_SEQUENCE_LENGTH and not short.truncated
    assert long.token_count == MAX_SEQUENCE_LENGTH and long.truncated


def test_prompts_seen_before_come_from_the_cache_within_its_budget(components, monkeypatch):
    encoder = components.text_encoder
    calls = []
    monkeypatch.setattr(encoder, "_run", lambda p, run=encoder._run: calls.append(p) or run(p))
    size = encoder.encode(["cached"])[0].embeds.nbytes
    monkeypatch.setattr(encoder, "_cache_bytes", 2 * size)
    for prompt in ("one", "two", "one", "three", "one", "two"):
        encoder.encode([prompt])
    assert calls[-4:] == ["one", "two", "three", "two"]
    assert encoder._cached_bytes <= 2 * size


@pytest.mark.slow
def test_system_message_is_flux2s():
    from diffusers.pipelines.flux2 import system_messages

    assert SYSTEM_MESSAGE == system_messages.SYSTEM_MESSAGE

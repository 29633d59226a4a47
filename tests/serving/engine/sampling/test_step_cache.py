"""Steps that reuse the last one: fewer of them, nearly the same image, nobody else's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from calotype.serving.config.built_in import BUILT_IN_MODEL
from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.testing.models import save_random_lora
from calotype.serving.weights.sources import model_folder as folder_of

CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def shapes():
    return load_components(folder_of(BUILT_IN_MODEL))


def test_a_higher_threshold_leaves_out_more_and_errs_more(shapes, new_engine, make_request):
    request = make_request("0", size=(128, 128), steps=20, guidance=2.5)
    skipped, errors = [], []
    for threshold in (0.0, 0.05, 0.2, 0.6):
        engine = new_engine(shapes)
        sampling = dataclasses.replace(request.sampling, step_cache=threshold)
        engine.add(dataclasses.replace(request, sampling=sampling))
        drawn = engine.run()
        if threshold == 0.0:
            whole = drawn.image("0")
        ending = drawn.ending("0")
        assert ending.evaluations == 20
        skipped.append(ending.skipped)
        errors.append(float(np.abs(drawn.image("0") - whole).mean()))
    assert skipped[0] == 0 and skipped == sorted(skipped) and skipped[1] < skipped[-1] < 20
    assert errors[1] < 0.02, "a gentle threshold keeps the picture"
    assert errors[1] <= errors[-1] and errors[-1] > 0


def test_a_left_out_step_runs_one_block(components, new_engine, make_request, monkeypatch):
    runs = []
    block = components.denoiser.single_transformer_blocks[0]
    handle = block.register_forward_hook(lambda *_: runs.append(1))
    engine = new_engine()
    engine.add(make_request(steps=10, step_cache=0.99))
    ending = engine.run().ending("r")
    handle.remove()
    assert 0 < ending.skipped == 10 - len(runs)


def test_others_of_a_batch_are_drawn_whole(
    components, model_folder, tmp_path, new_engine, make_request
):
    store = AdapterStore(components.denoiser)
    store.load("a", save_random_lora(model_folder, tmp_path / "a.safetensors"), wait=30)
    asked = [
        make_request("plain", steps=6, seed=1),
        make_request("cached", steps=12, seed=2, step_cache=0.9),
        make_request("adapter", steps=6, seed=3, adapters=(AdapterRef("a"),)),
        make_request(
            "both", steps=12, seed=4, step_cache=0.9, adapters=(AdapterRef("a", 0.5),),
            negative_prompt="a star",
        ),
    ]  # fmt: skip
    together = new_engine(adapters=store)
    for request in asked:
        together.add(request)
    drawn = together.run()
    for request in asked:
        alone = new_engine(adapters=store)
        alone.add(request)
        single = alone.run()
        ours, theirs = drawn.ending(request.id), single.ending(request.id)
        assert ours.skipped == theirs.skipped
        assert (ours.skipped > 0) == (request.sampling.step_cache > 0)
        np.testing.assert_allclose(drawn.image(request.id), single.image(request.id), **CLOSE)
    store.layers.remove()


def test_broken_numbers_are_not_reused(engine, make_request, components):
    """A cache that was filled with infinity must not make later steps look alike."""
    block = components.denoiser.transformer_blocks[0]

    def spoil(_module, _inputs, output):
        return tuple(torch.full_like(part, float("nan")) for part in output)

    handle = block.register_forward_hook(spoil)
    engine.add(make_request("bad", steps=6, step_cache=0.5))
    bad = engine.run().ending("bad")
    handle.remove()
    assert "no finite numbers" in bad.error.message
    engine.add(make_request("good", steps=2))
    assert np.isfinite(engine.run().image("good")).all()

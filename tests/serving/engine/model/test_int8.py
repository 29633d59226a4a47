"""int8 through torchao: nearly the image of bfloat16, with adapters, in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.quantization import is_quantised
from calotype.serving.testing.models import save_random_lora


@pytest.fixture(scope="module")
def loaded(model_folder):
    return {
        precision: load_components(model_folder, precision=precision)
        for precision in ("bfloat16", "int8")
    }


@pytest.fixture
def engines(loaded, new_engine, model_folder, tmp_path):
    path = save_random_lora(model_folder, tmp_path / "a.safetensors", strength=2.0)
    found = {}
    for precision, components in loaded.items():
        store = AdapterStore(components.denoiser)
        store.load("a", path, wait=30)
        found[precision] = new_engine(components, adapters=store)
    yield found
    for engine in found.values():
        engine.adapters.layers.remove()


def test_the_linear_layers_of_the_blocks_hold_int8(loaded):
    held = {
        name: module.weight.qdata.dtype
        for name, module in loaded["int8"].denoiser.named_modules()
        if is_quantised(module, name)
    }
    assert len(held) > 10 and set(held.values()) == {torch.int8}
    assert loaded["int8"].denoiser.proj_out.weight.dtype == torch.bfloat16


def test_images_are_nearly_those_of_bfloat16(engines, make_request):
    asked = [
        make_request("plain"),
        make_request("adapter", adapters=(AdapterRef("a"),)),
        make_request("negative", negative_prompt="a star", sampler="flow-dpmpp-2m"),
    ]
    drawn = {}
    for precision, engine in engines.items():
        for request in asked:
            engine.add(request)
        drawn[precision] = engine.run()
    for request in asked:
        ours = drawn["int8"].image(request.id)
        theirs = drawn["bfloat16"].image(request.id)
        error = np.abs(ours - theirs).mean()
        assert 0 < error < 0.02, "the weights are rounded, and not more than that"
    ours, plain = drawn["int8"].image("adapter"), drawn["int8"].image("plain")
    assert np.abs(ours - plain).mean() > 0.02, "the adapter acts"


def test_company_does_not_change_an_image(loaded, new_engine, make_request):
    crowd = new_engine(loaded["int8"])
    for i in range(4):
        crowd.add(make_request(f"r{i}", seed=i, guidance=1.0 + i))
    together = crowd.run()
    alone = new_engine(loaded["int8"])
    alone.add(make_request("r2", seed=2, guidance=3.0))
    # Each token is scaled by its own largest value; what is left is bfloat16's own rounding.
    np.testing.assert_allclose(together.image("r2"), alone.run().image("r2"), atol=0.03, rtol=0)

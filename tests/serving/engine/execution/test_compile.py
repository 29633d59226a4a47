"""torch.compile changes how fast an image is drawn, not the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.testing.models import save_random_lora

pytestmark = pytest.mark.slow
CLOSE = {"atol": 1e-4, "rtol": 0}


CALLS = []


def counting(graph, _inputs):
    def run(*args):
        CALLS.append(graph)
        return graph(*args)

    return run


@pytest.fixture
def compiled_calls():
    """What the backend "counting" of torch.compile ran."""
    from torch import _dynamo  # takes seconds, and most runs leave this file out

    if "counting" not in _dynamo.list_backends(exclude_tags=()):
        _dynamo.register_backend(counting)
    CALLS.clear()
    torch.compiler.reset()
    yield CALLS
    torch.compiler.reset()


def test_compiled_images_are_the_same(new_engine, make_request, compiled_calls):
    asked = [
        make_request("plain", steps=2),
        make_request("two passes", steps=2, negative_prompt="a star", seed=3),
        make_request("cached", steps=6, step_cache=0.9),
    ]
    images = []
    for engine in (new_engine(compiler="counting"), new_engine()):
        for request in asked:
            engine.add(request)
        drawn = engine.run()
        images.append([drawn.image(request.id) for request in asked])
        assert drawn.ending("cached").skipped > 0
    for ours, theirs in zip(*images, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    assert compiled_calls, "nothing was compiled"


def test_steps_with_adapters_are_not_compiled(
    components, model_folder, tmp_path, new_engine, make_request, compiled_calls
):
    store = AdapterStore(components.denoiser)
    store.load("a", save_random_lora(model_folder, tmp_path / "a.safetensors"), wait=30)
    request = make_request(adapters=(AdapterRef("a"),), steps=2)
    images = []
    for compiler in ("counting", None):
        engine = new_engine(adapters=store, compiler=compiler)
        engine.add(request)
        images.append(engine.run().image("r"))
    store.layers.remove()
    np.testing.assert_allclose(*images, **CLOSE)
    assert not compiled_calls


def test_inductor_draws_the_same(new_engine, make_request):
    images = []
    for compiler in ("inductor", None):
        engine = new_engine(compiler=compiler)
        engine.add(make_request(steps=2))
        images.append(engine.run().image("r"))
    np.testing.assert_allclose(*images, **CLOSE)

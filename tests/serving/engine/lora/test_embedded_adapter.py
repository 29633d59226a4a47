"""The packaged adapter visibly changes what the packaged model draws, by its scale."""

from __future__ import annotations

import numpy as np
import pytest

from calotype.serving.config.built_in import BUILT_IN_ADAPTER, BUILT_IN_MODEL
from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.weights.sources import adapter_file, model_folder

SEEDS = 3
PROMPT = "a large red circle in the center of a white background"


def banding(image):
    """How uneven the middle is, which lies inside the circle: 0 is one colour."""
    return float(image[54:74, 54:74].mean(axis=2).std())


def red(image):
    middle = image[54:74, 54:74].reshape(-1, 3).mean(axis=0)
    return middle[0] > 1.5 * max(middle[1], middle[2])


@pytest.fixture(scope="module")
def shapes():
    return load_components(model_folder(BUILT_IN_MODEL))


def test_stripes_are_seen_and_grow_with_the_scale(shapes, new_engine, make_request):
    store = AdapterStore(shapes.denoiser)
    store.load("stripes", adapter_file(BUILT_IN_ADAPTER), wait=60)
    engine = new_engine(shapes, adapters=store)
    for scale in (0.0, 0.5, 1.0):
        request = make_request(
            str(scale), prompt=PROMPT, size=(128, 128), steps=20, guidance=2.5, n=SEEDS,
            adapters=(AdapterRef("stripes", scale),),
        )  # fmt: skip
        engine.add(request)
    drawn = engine.run()
    store.layers.remove()
    seen = {
        scale: np.mean([banding(drawn.image(str(scale), i)) for i in range(SEEDS)])
        for scale in (0.0, 0.5, 1.0)
    }
    assert seen[0.0] < seen[0.5] < seen[1.0] and seen[1.0] > 3 * seen[0.0], seen
    # It changes the style of what is drawn, and not what is drawn.
    images = [drawn.image(s, i) for s in ("0.0", "1.0") for i in range(SEEDS)]
    assert sum(red(picture) for picture in images) >= 2 * SEEDS - 1

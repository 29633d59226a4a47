"""The guidance input of the packaged model is seen in its images: the more, the stronger."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from calotype.serving.config.built_in import BUILT_IN_MODEL
from calotype.serving.engine.model.components import load_components
from calotype.serving.weights.sources import model_folder

PROMPTS = (
    "a large red circle in the center of a white background",
    "a small green star on a blue background, at the top left",
    "a medium yellow heart on a purple background",
    "a large black ring on an orange background, on the right",
)
SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)


@pytest.mark.slow
def test_guidance_has_a_visible_and_monotone_effect(new_engine, make_request):
    engine = new_engine(load_components(model_folder(BUILT_IN_MODEL)))
    for prompt, scale in itertools.product(PROMPTS, SCALES):
        engine.add(
            make_request(
                f"{prompt} {scale}", prompt=prompt, size=(128, 128), steps=20, guidance=scale, n=2
            )
        )
    drawn = engine.run()
    images = {
        scale: np.stack(
            [drawn.image(f"{prompt} {scale}", i) for prompt in PROMPTS for i in range(2)]
        )
        for scale in SCALES
    }
    moved = [np.abs(images[scale] - images[1.0]).mean() for scale in SCALES[1:]]
    assert moved == sorted(moved), moved
    assert moved[0] > 0.004 and moved[-1] > 0.008, moved  # of 1, over the whole image

"""The linear layers of a configuration are those of the modules that it builds."""

from __future__ import annotations

import pytest

from calotype.serving.engine.lora.lora_file import linear_shapes
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.model.weight_files import unfilled
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.linear_layers import linear_layers
from calotype.serving.engine.sizing.model_sizes import KNOWN_MODELS
from calotype.serving.testing.models import TRANSFORMER


@pytest.mark.parametrize("config", [TRANSFORMER, *(m.denoiser for m in KNOWN_MODELS.values())])
def test_they_are_those_of_the_modules(config):
    sizes = TransformerConfig.from_json(config)
    with unfilled():
        model = Transformer(sizes)
    assert linear_layers(sizes) == linear_shapes(model)

"""int8 weights and activations (dynamic W8A8) through torchao.

The one precision below bfloat16 that buys time on an A100, which has int8 but no fp8 tensor cores.
"""

from __future__ import annotations

import importlib
from typing import TypeVar

from torch import nn

from calotype.serving.errors import ModelLoadFailed

Model = TypeVar("Model", bound=nn.Module)


def quantize_int8(model: Model) -> Model:
    """Replaces the weights of every linear layer, in place.

    Raises:
        ModelLoadFailed: torchao is not installed.
    """
    try:
        quantization = importlib.import_module("torchao.quantization")
    except ImportError:
        raise ModelLoadFailed(
            "precision int8 needs torchao, which is not installed; run `pip install torchao` or "
            "choose precision bfloat16.",
            param="precision",
        ) from None
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model

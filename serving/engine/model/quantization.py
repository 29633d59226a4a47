"""int8 weights and activations (dynamic W8A8) through torchao.

The one precision below bfloat16 that buys time on an A100, which has int8 but no fp8 tensor cores.
"""

from __future__ import annotations

import importlib
import re
from typing import TypeVar

from torch import nn

from calotype.serving.core.errors import ModelLoadFailed

Model = TypeVar("Model", bound=nn.Module)

_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")


def is_quantised(module: nn.Module, name: str) -> bool:
    """Whether `quantize_int8` touches a module: linear layers inside the numbered ones.

    Embeddings of time, guidance and text, modulations and the output are a few percent of the
    weights, and the image depends most on them.
    """
    return isinstance(module, nn.Linear) and _IN_A_LAYER.search(name) is not None


def quantize_int8(model: Model) -> Model:
    """Replaces the weights of the linear layers inside a model's repeated layers, in place.

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
    configuration = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model, configuration, filter_fn=is_quantised)
    return model

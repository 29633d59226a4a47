"""DoRA: the norms of a changed layer's weights are learned apart (arXiv 2402.09353).

The changed weights are ``m / ||W + BA|| * (W + BA)``. With ``g = m / ||W + BA||`` that is
``W + (g - 1) W + g BA``: a multiple of the layer's own output, and factors that have g in them.
Adapters are not merged, so ``g`` is computed once, from the weights of the model that serves.

Norms are of each row (PEFT; LyCORIS and OneTrainer on the output axis) or of each column (LyCORIS'
and OneTrainer's first form). A scale other than 1 leads from W to the changed weights in a straight
line, as in ComfyUI; PEFT scales BA before the norm, which is the same at 0 and 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from calotype.serving.engine.lora.low_rank import Gain, LoraLayer, Magnitude

_ROWS = 4096
"""Rows of a layer that are rebuilt at a time: 100 MB in float32 at a width of 6,144."""

Weights = Callable[[str], torch.Tensor]
"""Module name of the denoiser -> its weight [out_features, in_features]."""


def with_gains(layers: Mapping[str, LoraLayer], weights: Weights) -> dict[str, LoraLayer]:
    """Layers with their magnitudes applied to a model's weights; others as they are.

    Factors come back on their own device and in their own type.
    """
    return {
        module: layer
        if layer.magnitude is None
        else _with_gain(module, layer, layer.magnitude, layers, weights)
        for module, layer in layers.items()
    }


def _with_gain(
    module: str,
    layer: LoraLayer,
    magnitude: Magnitude,
    layers: Mapping[str, LoraLayer],
    weights: Weights,
) -> LoraLayer:
    joint = (module,) if magnitude.per_row else magnitude.joint
    squares = [_squares(layers[part], weights(part), magnitude.per_row) for part in joint]
    # A layer of zeros has no direction: its magnitude is kept from becoming infinite.
    norm = torch.stack(squares).sum(0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    gain = magnitude.values / norm.to(magnitude.values.device)
    down, up = layer.down.float(), layer.up.float()
    if magnitude.per_row:
        up = up * gain[:, None]
    else:
        down = down * gain
    return dataclasses.replace(
        layer,
        down=down.to(layer.down.dtype),
        up=up.to(layer.up.dtype),
        magnitude=None,
        gain=Gain(gain - 1, magnitude.per_row),
    )


def _squares(layer: LoraLayer, weight: torch.Tensor, per_row: bool) -> torch.Tensor:
    """Sums of squares of the changed weights, of each row or each column, float32."""
    down, up = (factor.to(weight.device).float() for factor in (layer.down, layer.up))
    sums: list[torch.Tensor] = []
    for begin in range(0, weight.shape[0], _ROWS):
        rows = weight[begin : begin + _ROWS].float() + up[begin : begin + _ROWS] @ down
        sums.append(rows.square().sum(1 if per_row else 0))
    return torch.cat(sums) if per_row else torch.stack(sums).sum(0)

"""How values of several models become one: arithmetic on one tensor at a time, in float32.

linear: weighted mean (model soups, arXiv 2203.05482). slerp: along the great circle. task:
differences from a base, added (2212.04089). ties: of each difference the largest values, of these
the sign of the majority (2306.01708). dare: values of differences dropped by lot and the rest made
larger by as much (2311.03099).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from calotype.serving.weights.merging.recipe import MergeRecipe

_PARALLEL = 1e-6
"""Sine of the angle below which two tensors count as parallel: a straight line is exact enough."""


def merge_tensors(
    recipe: MergeRecipe,
    name: str,
    values: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: torch.Tensor | None,
) -> torch.Tensor:
    """One tensor of the result, float32.

    Args:
        values: of each input, float32; they may be overwritten.
        weights: of each input for this tensor.
        base: of the base, for the methods that have one.
    """
    if recipe.method == "linear":
        total = sum(weights)
        return _summed(values, [weight / total for weight in weights])
    if recipe.method == "slerp":
        return _slerp(values[0], values[1], weights[1] / sum(weights))
    assert base is not None
    differences = [value.sub_(base) for value in values]
    if recipe.method == "task":
        return _summed(differences, weights).add_(base)
    if recipe.method == "ties":
        return _ties(differences, weights, recipe.density).add_(base)
    kept = [
        _dropped(difference, recipe.density, _seed(recipe.seed, name, place))
        for place, difference in enumerate(differences)
    ]
    return _summed(kept, weights).add_(base)


def _summed(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    result = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        result.add_(value, alpha=weight)
    return result


def _slerp(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    norms = _norm(a) * _norm(b)
    cosine = 1.0 if norms == 0 else (a * b).sum(dtype=torch.float64).item() / norms
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    sine = math.sin(angle)
    if sine < _PARALLEL:
        return _summed((a, b), (1 - share, share))
    first, second = math.sin((1 - share) * angle) / sine, math.sin(share * angle) / sine
    return _summed((a, b), (first, second))


def _norm(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _ties(
    differences: Sequence[torch.Tensor], weights: Sequence[float], density: float
) -> torch.Tensor:
    trimmed = [_largest(d, density).mul_(w) for d, w in zip(differences, weights, strict=True)]
    sign = torch.sign(_summed(trimmed, [1.0] * len(trimmed)))
    result, shares = torch.zeros_like(sign), torch.zeros_like(sign)
    for difference, weight in zip(trimmed, weights, strict=True):
        agrees = (torch.sign(difference) == sign) & (difference != 0)
        result.add_(torch.where(agrees, difference, 0.0))
        shares.add_(agrees, alpha=abs(weight))
    return result.div_(shares.clamp_min(torch.finfo(torch.float32).tiny))


def _largest(difference: torch.Tensor, density: float) -> torch.Tensor:
    """With zeros for all but the largest values, by their size."""
    count = difference.numel()
    kept = max(1, round(count * density))
    if kept == count:
        return difference
    sizes = difference.abs().flatten()
    least = sizes.kthvalue(count - kept + 1).values
    return difference.masked_fill_((sizes < least).view_as(difference), 0.0)


def _dropped(difference: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    if density == 1:
        return difference
    lots = torch.rand(difference.shape, generator=torch.Generator().manual_seed(seed))
    return difference.masked_fill_(lots >= density, 0.0).div_(density)


def _seed(seed: int, name: str, place: int) -> int:
    """A lot of its own for each tensor of each input, whatever the order of shards."""
    digest = hashlib.sha256(f"{seed} {place} {name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")

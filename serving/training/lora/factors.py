"""The trainable factors of a LoRA, and how they act on a frozen denoiser while it is trained.

All factors lie in one float32 vector, so that clipping, the optimiser, the average and a checkpoint
each touch one tensor. The base weights are never changed, and never rounded together with the
adapter. Paper: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


class LoraFactors:
    """Factors A [rank, in] and B [out, rank] of each target layer, as views of one vector.

    B starts at zero, so that the untrained adapter changes nothing, to the bit.

    Args:
        targets: the denoiser's layers by name, which are trained on; they get a forward of ours
            until `remove`.
        rank: of every factor.
        scale: alpha / rank.
        seed: of the start values of A.

    Attributes:
        vector: every factor, float32 [parameters]; its ``grad`` is filled by backward.
    """

    def __init__(
        self, targets: Mapping[str, torch.nn.Linear], *, rank: int, scale: float, seed: int
    ) -> None:
        self.rank, self.scale, self.active = rank, scale, False
        self._targets = dict(targets)
        device = next(iter(targets.values())).weight.device
        sizes = [rank * (m.in_features + m.out_features) for m in targets.values()]
        self.vector = torch.nn.Parameter(torch.zeros(sum(sizes), device=device))
        self.vector.grad = torch.zeros_like(self.vector)
        self._parts: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
        generator = torch.Generator().manual_seed(seed)
        place = 0
        for name, module in targets.items():
            parts = []
            for shape in ((rank, module.in_features), (module.out_features, rank)):
                end = place + shape[0] * shape[1]
                part = torch.nn.Parameter(self.vector.detach()[place:end].view(shape))
                part.grad = self.vector.grad[place:end].view(shape)
                parts.append(part)
                place = end
            down, up = parts
            with torch.no_grad():
                # As PEFT's "gaussian": a standard deviation of 1 / rank.
                down.copy_(torch.randn(down.shape, generator=generator) / rank)
            self._parts[name] = (down, up)
            module.forward = functools.partial(self._forward, module, down, up)  # type: ignore[method-assign]

    def _forward(
        self,
        module: torch.nn.Linear,
        down: torch.nn.Parameter,
        up: torch.nn.Parameter,
        x: torch.Tensor,
    ) -> torch.Tensor:
        if not self.active:
            return type(module).forward(module, x)
        if type(module.weight) is torch.nn.Parameter and module.weight.dtype == torch.float32:
            joined: torch.Tensor = _Joined.apply(x, module.weight, down, up, self.scale)
            return joined
        # Of a bfloat16 or int8 base the sum of both products is rounded, not the sum of weights:
        # small changes would be lost in the weights.
        small = functional.linear(x, down.to(x.dtype))
        added = functional.linear(small, up.to(x.dtype)) * self.scale
        return functional.linear(x, module.weight) + added

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the denoiser predicts with the adapter; outside, without."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    @contextmanager
    def holding(self, other: torch.Tensor) -> Iterator[None]:
        """Within, the factors have the values of another vector, for example their average."""
        kept = self.vector.detach().clone()
        with torch.no_grad():
            self.vector.copy_(other)
        try:
            yield
        finally:
            with torch.no_grad():
                self.vector.copy_(kept)

    def named(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each layer, views of `vector`."""
        return {name: (down.detach(), up.detach()) for name, (down, up) in self._parts.items()}

    def remove(self) -> None:
        """Gives the layers their own forward back."""
        for module in self._targets.values():
            module.__dict__.pop("forward", None)


class NormGradients:
    """Gives the RMS norms of a denoiser's heads a gradient of few operations, until `remove`.

    On a CPU torch's own is made of a dozen, each over all tokens.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)]
        for module in self._norms:
            module.forward = functools.partial(_normed, module)  # type: ignore[method-assign]

    def remove(self) -> None:
        for module in self._norms:
            module.__dict__.pop("forward", None)


def _normed(module: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    if not x.requires_grad or x.dtype != torch.float32 or module.weight is None:
        plain: torch.Tensor = type(module).forward(module, x)
        return plain
    out: torch.Tensor = _Normed.apply(x, module.weight, module.eps)
    return out


class _Normed(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: torch.Tensor = (x * scale).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        weighted = gradients[0] * weight
        share = (weighted * x).mean(-1, keepdim=True).mul_(scale**2)
        return weighted.sub_(x * share).mul_(scale), None, None


class _Joined(torch.autograd.Function):
    """x (W + scale B A)^T in one product, for a float32 base.

    The weights' sum costs rank x in x out, a product with them tokens x in x out: with hundreds of
    tokens this saves the two thin products forward and two of five backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        whole = torch.addmm(weight, up, down, alpha=scale)
        ctx.save_for_backward(x, whole, down, up)
        ctx.scale = scale
        return functional.linear(x, whole)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, whole, down, up = ctx.saved_tensors
        out = gradients[0].flatten(0, -2)
        rows = x.flatten(0, -2)
        of_x = (out @ whole).view_as(x) if ctx.needs_input_grad[0] else None
        of_up = (out.t() @ (rows @ down.t())).mul_(ctx.scale)
        of_down = (out @ up).mul_(ctx.scale).t() @ rows
        return of_x, None, of_down, of_up, None

"""What a step minimises: FLUX.2's flow-matching loss, and the preservation of the class.

A picture x and noise z are mixed to (1 - t) x + t z, and the denoiser is to say z - x. Every tenth
or so step also asks that a caption which names the class instead of the trigger draws what it drew
before: the loss is against the frozen base's own prediction (ai-toolkit calls it differential
output preservation). Mixing, target, times and guidance as in the scripts of diffusers and
musubi-tuner for FLUX.2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from calotype.serving.engine.execution.forward import Forward, rotary_tables
from calotype.serving.engine.model.transformer import Rotary, Transformer
from calotype.serving.engine.scheduling.scheduler import Bucket
from calotype.serving.training.lora.factors import LoraFactors, NormGradients

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step sees.

    Attributes:
        latents: normalised tokens [n, rows * columns, channels].
        text: embeddings of the captions, [n, text tokens, width].
        classes: of the captions with the class word in place of the trigger; None where the step
            preserves nothing.
    """

    rows: int
    columns: int
    latents: torch.Tensor
    text: torch.Tensor
    classes: torch.Tensor | None = None


def sample_times(count: int, tokens: int, lean: float, generator: torch.Generator) -> torch.Tensor:
    """Shares of noise in 0..1, [count]: logit-normal, shifted by exp(mu).

    mu goes from 0.5 at 256 image tokens to 1.15 at 4096, as FLUX's own training shift. The normal
    is stratified: one draw from each of ``count`` slices of equal probability.
    """
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256) + lean
    even = (
        torch.rand(count, generator=generator) + torch.randperm(count, generator=generator)
    ) / count
    normal = torch.special.ndtri(even.clamp(1e-6, 1 - 1e-6))
    return torch.sigmoid(normal + mu)


class Objective:
    """The loss of a step on a frozen denoiser with trainable factors.

    Args:
        guidance: scale that the denoiser is fed, where it takes one.
        lean: added to mu of `sample_times`: above 0 noisy times come more often.
        recompute: forget the activations of each block and compute them again in backward.
    """

    def __init__(
        self,
        model: Transformer,
        factors: LoraFactors,
        *,
        guidance: float,
        lean: float = 0.0,
        recompute: bool = False,
    ) -> None:
        self._model, self._factors = model, factors
        self._forward = Forward(model)
        self._norms = NormGradients(model)
        self._guidance, self._lean, self._recompute = guidance, lean, recompute
        self._device = factors.vector.device
        self._dtype = model.x_embedder.weight.dtype

    def close(self) -> None:
        """Gives the model its own norms back."""
        self._norms.remove()

    def loss(self, batch: Batch, generator: torch.Generator, part: slice = _ALL) -> torch.Tensor:
        """Mean squared error of the velocity.

        Args:
            generator: on the CPU; everything random in the step comes from it.
            part: the pictures of the step that count here; noise is drawn for all of them.
        """
        noisy, times, velocity = self._mixed(batch, generator, part)
        rotary = self._rotary(batch.rows, batch.columns, batch.text.shape[1])
        predicted = self._predict(noisy, times, batch.text[part], rotary)
        return (predicted.float() - velocity).square().mean()

    def preservation(
        self, batch: Batch, generator: torch.Generator, part: slice = _ALL
    ) -> torch.Tensor:
        """Mean squared change of what the class captions predict."""
        if batch.classes is None:
            raise ValueError("the batch has no class captions")
        noisy, times, _ = self._mixed(batch, generator, part)
        rotary = self._rotary(batch.rows, batch.columns, batch.text.shape[1])
        classes = batch.classes[part]
        with torch.no_grad():
            before = self._run(noisy, times, classes, rotary)
        predicted = self._predict(noisy, times, classes, rotary)
        return (predicted.float() - before.float()).square().mean()

    def _mixed(
        self, batch: Batch, generator: torch.Generator, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count, tokens, _ = batch.latents.shape
        times = sample_times(count, tokens, self._lean, generator).to(self._device)
        clean = batch.latents.float()
        # Drawn on the CPU: the same run on another device sees the same noise.
        noise = torch.randn(clean.shape, generator=generator).to(self._device)
        clean, noise, times = clean[part], noise[part], times[part]
        share = times[:, None, None]
        return ((1 - share) * clean + share * noise).to(self._dtype), times, noise - clean

    def _predict(
        self, noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        with self._factors.applied(), self._checkpointed():
            return self._run(noisy, times, text, rotary)

    def _run(
        self, noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        guidance = None
        if self._model.config.guidance_embeds:
            guidance = torch.full_like(times, self._guidance)
        return self._forward.run(
            noisy, times, guidance, text.to(self._dtype), rotary, noisy.shape[1]
        )

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        if not self._recompute:
            yield
            return
        blocks = [*self._model.transformer_blocks, *self._model.single_transformer_blocks]
        for block in blocks:
            block.forward = functools.partial(
                checkpoint, functools.partial(self._again, block), use_reentrant=False
            )
        try:
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _again(self, block: torch.nn.Module, *inputs: object) -> object:
        # Backward runs this when the adapter is no longer applied.
        before, self._factors.active = self._factors.active, True
        try:
            return type(block).forward(block, *inputs)
        finally:
            self._factors.active = before

    @functools.lru_cache(maxsize=64)  # noqa: B019, an objective lives as long as its run
    def _rotary(self, rows: int, columns: int, text: int) -> Rotary:
        return rotary_tables(self._model, Bucket(rows, columns, text), self._device)


def learning_rate(
    step: int, steps: int, peak: float, warm: float = 0.05, fall: float = 0.2
) -> float:
    """Rate of a step: a linear rise over the first 5 %, a cosine to 2 % over the last 20 %."""
    rising = min(1.0, (step + 1) / max(1.0, warm * steps))
    left = max(0.0, (step + 1 - (1 - fall) * steps) / max(1.0, fall * steps))
    return peak * rising * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, left))))

"""Runs rows of one bucket through the denoiser once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from calotype.serving.engine.batch import Row
from calotype.serving.engine.latents import TokenGrid, draw_noise, image_ids, text_ids
from calotype.serving.engine.lora_layers import LoraLayers
from calotype.serving.engine.scheduler import Bucket


class Denoiser:
    """Collates rows, calls diffusers' Flux2Transformer2DModel, and steps the rows' latents.

    Args:
        model: the transformer.
        lora: what adds the rows' adapters.
        dtype: of latents, as Flux2Pipeline keeps them.
    """

    def __init__(self, model: Any, lora: LoraLayers, device: torch.device, dtype: torch.dtype):
        self.model = model
        self.device = device
        self.dtype = dtype
        self.token_channels: int = model.config.in_channels
        self.joint_dim: int = model.config.joint_attention_dim
        self._lora = lora
        self._guided: bool = model.config.guidance_embeds
        self._ids: dict[Bucket, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, rows: Sequence[Row], bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities and the latents they were predicted from, each [rows, tokens, channels]."""
        for row in rows:
            if row.latents is None:
                grid = TokenGrid(bucket.rows, bucket.columns)
                noise = draw_noise(row.seed, grid, self.token_channels, self.dtype)
                row.latents = noise.to(self.device)
        latents = _stacked([row.latents for row in rows if row.latents is not None])
        embeds = _stacked([row.embeds for row in rows])
        times = [row.sampler.timestep for row in rows]
        timestep = torch.tensor(times, dtype=self.dtype, device=self.device)
        guidance = None
        if self._guided:
            scales = [row.guidance for row in rows]
            guidance = torch.tensor(scales, dtype=torch.float32, device=self.device)
        picture_ids, words_ids = self._position_ids(bucket)
        with self._lora.applied([row.stack for row in rows]):
            velocity: torch.Tensor = self.model(
                hidden_states=latents,
                timestep=timestep,
                guidance=guidance,
                encoder_hidden_states=embeds,
                txt_ids=words_ids,
                img_ids=picture_ids,
                return_dict=False,
            )[0]
        return velocity, latents

    def advance(
        self, rows: Sequence[Row], velocity: torch.Tensor, latents: torch.Tensor
    ) -> list[bool]:
        """Steps every row by its own sampler; says for each whether its latents are finite."""
        deltas = [row.sampler.linear_step() for row in rows]
        if None in deltas:
            stepped = torch.stack(
                [row.sampler.step(velocity[i], latents[i]) for i, row in enumerate(rows)]
            )
        else:
            delta = torch.tensor(deltas, dtype=torch.float32, device=self.device).view(-1, 1, 1)
            # As the diffusers scheduler rounds: the product in the model's dtype, the sum in
            # float32.
            stepped = (latents.float() + (delta * velocity).to(velocity.dtype)).to(velocity.dtype)
            for row in rows:
                row.sampler.advance()
        for row, latent in zip(rows, stepped.unbind(), strict=True):
            row.latents = latent
        # The one wait for the device in a step. It also keeps the host from running ahead, so
        # that an abort is honoured at the next step and not after fifty queued ones.
        finite: list[bool] = stepped.isfinite().flatten(1).all(1).tolist()
        return finite

    def _position_ids(self, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._ids.get(bucket)
        if found is None:
            grid = TokenGrid(bucket.rows, bucket.columns)
            found = (image_ids(grid).to(self.device), text_ids(bucket.text_tokens).to(self.device))
            self._ids[bucket] = found
        return found


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))

"""Runs rows of one bucket through the denoiser once, and steps their latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import torch

from calotype.serving.engine.control.hints import Controls
from calotype.serving.engine.execution.batch import Pass, Row
from calotype.serving.engine.lora.lora_layers import Stack
from calotype.serving.engine.model.conditioning import Seen
from calotype.serving.engine.model.latents import TokenGrid
from calotype.serving.engine.sampling.samplers import LinearSampler, step_together
from calotype.serving.engine.sampling.step_cache import StepCache
from calotype.serving.engine.scheduling.scheduler import Bucket

_KEPT_BYTES = 30 * 2**20
"""A little under the largest block that glibc ever keeps, 32 MiB (DEFAULT_MMAP_THRESHOLD_MAX)."""


class PassRunner(Protocol):
    """`forward.Forward` on one device, `parallel.ParallelForward` on several."""

    def __call__(
        self,
        hidden: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        embeds: torch.Tensor,
        bucket: Bucket,
        caches: Sequence[StepCache | None],
        stacks: Sequence[Stack],
        controls: Sequence[Controls] = (),
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class _Extras(TypedDict, total=False):
    controls: Sequence[Controls]
    bias: torch.Tensor


class Denoiser:
    """Collates rows, calls diffusers' Flux2Transformer2DModel, and steps the rows' latents.

    Args:
        model: the transformer.
        forward: runs passes through the transformer.
        dtype: of latents, as Flux2Pipeline keeps them.
    """

    def __init__(
        self, model: Any, forward: PassRunner, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.token_channels: int = model.config.in_channels
        self.joint_dim: int = model.config.joint_attention_dim
        self._guided: bool = model.config.guidance_embeds
        self._forward = forward
        if device.type == "cpu":
            # Blocks larger than any freed before go back to the system at once, which costs a
            # batch a quarter of its time. So a block as large as glibc keeps is freed first.
            torch.empty(_KEPT_BYTES, dtype=torch.uint8)

    def run(
        self, rows: Sequence[Row], bucket: Bucket, max_passes: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities and the latents they were predicted from, each [rows, tokens, channels].

        Args:
            max_passes: passes that are run at once; a row with a negative prompt has two.
        """
        for row in rows:
            if row.latents is None:
                self._start(row, bucket)
        latents = _stacked([row.latents for row in rows if row.latents is not None])
        # All prompts first, then the negative prompts, so that the rows stay where they are.
        second = [i for i, row in enumerate(rows) if len(row.passes) > 1]
        passes = [(row, row.passes[0]) for row in rows] + [
            (rows[i], rows[i].passes[1]) for i in second
        ]
        place = self._sent(torch.tensor(second)) if second else None
        hidden = latents if place is None else torch.cat([latents, latents.index_select(0, place)])
        limit = max_passes or len(passes)
        parts = [
            self._predict(passes[begin : begin + limit], hidden[begin : begin + limit], bucket)
            for begin in range(0, len(passes), limit)
        ]
        velocity = parts[0] if len(parts) == 1 else torch.cat(parts)
        if place is not None:
            weights = [rows[i].true_guidance - 1 for i in second]
            first, other = velocity[: len(rows)], velocity[len(rows) :]
            over = self._sent(torch.tensor(weights, dtype=velocity.dtype)).view(-1, 1, 1)
            apart = first.index_select(0, place) - other
            velocity = first.index_add(0, place, over * apart)
        return velocity, latents

    def _predict(
        self, passes: Sequence[tuple[Row, Pass]], hidden: torch.Tensor, bucket: Bucket
    ) -> torch.Tensor:
        """Velocities; passes that look at the same references are run together."""
        groups: dict[Seen | None, list[int]] = {}
        for place, (row, _) in enumerate(passes):
            uses = row.conditions.uses
            seen = row.conditions.seen(row.step, row.steps) if uses else None
            groups.setdefault(seen, []).append(place)
        if len(groups) == 1:
            return self._run(passes, hidden, bucket, *groups)
        out = torch.empty_like(hidden)
        for seen, places in groups.items():
            at = self._sent(torch.tensor(places))
            part = self._run([passes[i] for i in places], hidden.index_select(0, at), bucket, seen)
            out.index_copy_(0, at, part)
        return out

    def _run(
        self,
        passes: Sequence[tuple[Row, Pass]],
        hidden: torch.Tensor,
        bucket: Bucket,
        seen: Seen | None,
    ) -> torch.Tensor:
        """Args:
        seen: the references that these passes look at; None is all.
        """
        bias = None
        if bucket.references and seen != ():
            given = [r for row, _ in passes if (r := row.conditions.references) is not None]
            tokens = _stacked(given)
            if seen is not None:
                tokens = torch.cat([_reference(tokens, bucket, place) for place, _ in seen], dim=1)
                bias = self._bias(bucket, seen)
            hidden = torch.cat([hidden, tokens], dim=1)
        if seen is not None:
            bucket = bucket.seeing([place for place, _ in seen])
        times = [row.sampler.timestep for row, _ in passes]
        guidance = None
        if self._guided:
            scales = [one.guidance for _, one in passes]
            guidance = self._sent(torch.tensor(scales, dtype=torch.float32))
        return self._forward(
            hidden,
            self._sent(torch.tensor(times, dtype=self.dtype)),
            guidance,
            _stacked([one.embeds for _, one in passes]),
            bucket,
            [one.cache for _, one in passes],
            [row.stack for row, _ in passes],
            **self._extras(passes, bias),
        )

    def _extras(self, passes: Sequence[tuple[Row, Pass]], bias: torch.Tensor | None) -> _Extras:
        """What only some requests ask for, and several devices cannot do together."""
        found: _Extras = {} if bias is None else {"bias": bias}
        controls = [
            tuple(c for c in row.controls if c.acts(row.step, row.steps)) for row, _ in passes
        ]
        if any(controls):
            found["controls"] = controls
        return found

    def _bias(self, bucket: Bucket, seen: Seen) -> torch.Tensor | None:
        """What is added to the attention on each token; None where all count alike."""
        if all(strength == 1 for _, strength in seen):
            return None
        own = torch.zeros(bucket.text_tokens + bucket.rows * bucket.columns)
        sizes = [bucket.references[place] for place, _ in seen]
        parts = [
            torch.full((rows * columns,), math.log(strength))
            for (rows, columns), (_, strength) in zip(sizes, seen, strict=True)
        ]
        return self._sent(torch.cat([own, *parts]))

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on the device, without waiting for the device."""
        return tensor.to(self.device, non_blocking=True)

    def _start(self, row: Row, bucket: Bucket) -> None:
        grid = TokenGrid(bucket.rows, bucket.columns)
        noise = self._sent(row.noise.first(grid, self.token_channels, self.dtype))
        row.latents = row.conditions.noised(noise, row.sampler.sigma)
        if row.conditions.redraw is not None:
            row.start_noise = noise

    def advance(
        self, rows: Sequence[Row], velocity: torch.Tensor, latents: torch.Tensor
    ) -> list[tuple[Row, Exception]]:
        """Steps every row by its own sampler; returns the rows whose sampler failed."""
        groups: dict[int, list[int]] = {}
        failed: list[tuple[Row, Exception]] = []
        for i, row in enumerate(rows):
            sampler = row.sampler
            if isinstance(sampler, LinearSampler):
                groups.setdefault(sampler.plan.remembered, []).append(i)
                continue
            try:
                row.latents = sampler.step(velocity[i], latents[i])
            except Exception as error:  # code of somebody else's package
                failed.append((row, error))
        for places in groups.values():
            mine = None if len(places) == len(rows) else self._sent(torch.tensor(places))
            stepped = step_together(
                [s for i in places if isinstance(s := rows[i].sampler, LinearSampler)],
                velocity if mine is None else velocity.index_select(0, mine),
                latents if mine is None else latents.index_select(0, mine),
            )
            for i, latent in zip(places, stepped.unbind(), strict=True):
                rows[i].latents = latent
        for row in rows:
            if row.start_noise is not None and row.latents is not None:
                row.latents = row.conditions.kept(row.latents, row.start_noise, row.sampler.sigma)
        return failed


def _reference(tokens: torch.Tensor, bucket: Bucket, place: int) -> torch.Tensor:
    """The tokens of one of all references."""
    lengths = [rows * columns for rows, columns in bucket.references]
    begin = sum(lengths[:place])
    return tokens[:, begin : begin + lengths[place]]


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))

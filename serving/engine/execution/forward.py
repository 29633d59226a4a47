"""Runs passes of a bucket through the denoiser.

Rotary tables are made once per shape and not once per step, reference tokens are not put through
the output layers, and blocks can be left out (`step_cache`). A test holds it to the forward of
diffusers' Flux2Transformer2DModel.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from calotype.serving.engine.control.hints import Controls, Hints, hints_of
from calotype.serving.engine.lora.lora_layers import LoraLayers, Stack
from calotype.serving.engine.model.latents import TokenGrid, image_ids, text_ids
from calotype.serving.engine.model.row_linear import keep_rows_apart
from calotype.serving.engine.model.transformer import (
    Rotary,
    Transformer,
    attend,
    weighted_attend,
)
from calotype.serving.engine.sampling.step_cache import StepCache, fitting
from calotype.serving.engine.scheduling.scheduler import Bucket

_LAYOUTS_KEPT = 32


class Forward:
    """Runs passes of one bucket through the denoiser.

    Each pass comes out the same to the bit alone and in any company (`row_linear`).

    Args:
        lora: what adds adapters; None for a model without.
        compiler: backend of torch.compile for the blocks, for example "inductor"; None runs them
            as they are. Steps with adapters are never compiled: every new stack of them would
            be compiled again.
    """

    def __init__(
        self, model: Transformer, lora: LoraLayers | None = None, compiler: str | None = None
    ) -> None:
        keep_rows_apart(model)
        self._model = model
        self._eager = (list(model.transformer_blocks), list(model.single_transformer_blocks))
        self._lora = lora
        self._compiled: tuple[list[Any], list[Any]] | None = None
        if compiler is not None:
            # All blocks of a kind share what was compiled for the first one.
            self._compiled = (
                [torch.compile(block, backend=compiler) for block in self._eager[0]],
                [torch.compile(block, backend=compiler) for block in self._eager[1]],
            )
        self._layouts: OrderedDict[Bucket, Rotary] = OrderedDict()
        self._weights: torch.Tensor | None = None

    def __call__(
        self,
        hidden: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        embeds: torch.Tensor,
        bucket: Bucket,
        caches: Sequence[StepCache | None] = (),
        stacks: Sequence[Stack] = (),
        controls: Sequence[Controls] = (),
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocities of the images' own tokens, [passes, tokens, channels].

        Args:
            hidden: latents and behind them reference tokens, [passes, image tokens, channels].
            timestep: [passes], 1 is noise.
            guidance: [passes], or None for a model that takes none.
            embeds: [passes, text tokens, joint_attention_dim].
            caches: of each pass; empty if there are none.
            stacks: adapters of each pass; empty if there are none.
            controls: those of each pass that act at this step; empty if there are none.
            bias: of each key in attention, [tokens]; None if all count alike.
        """
        rotary = self._rotary(bucket, hidden.device)
        shown = bucket.rows * bucket.columns
        with self._weighted(bias):
            return self.run(
                hidden, timestep, guidance, embeds, rotary, shown, caches, stacks, controls
            )

    def run(
        self,
        hidden: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        embeds: torch.Tensor,
        rotary: Rotary,
        shown: int,
        caches: Sequence[StepCache | None] = (),
        stacks: Sequence[Stack] = (),
        controls: Sequence[Controls] = (),
    ) -> torch.Tensor:
        """The same of any tokens, of which the first ``shown`` are put out."""
        model = self._model
        dtype = hidden.dtype
        with self._applied(stacks, range(len(stacks))):
            scale = None if guidance is None else guidance.to(dtype) * 1000
            time = model.time_guidance_embed(timestep.to(dtype) * 1000, scale)
            plain = self._weights is None and not any(stacks)
            doubles, singles = (self._compiled or self._eager) if plain else self._eager
            blocks = _Blocks(
                doubles,
                singles,
                rotary,
                model.double_stream_modulation_img(time),
                model.double_stream_modulation_txt(time),
                model.single_stream_modulation(time),
            )
            streams = [model.x_embedder(hidden), model.context_embedder(embeds)]
            if any(controls):
                image, text = streams
                mods = blocks.image_mod, blocks.text_mod
                blocks.hints = hints_of(controls, image, text, *mods, rotary)
            if any(cache is not None for cache in caches):
                image = self._through_caches(blocks, streams, caches, stacks)
            else:
                blocks.first(streams)
                image = blocks.rest(streams)
            out: torch.Tensor = model.proj_out(model.norm_out(image[:, :shown], time))
        return out

    @contextlib.contextmanager
    def _weighted(self, bias: torch.Tensor | None) -> Iterator[None]:
        """Within, keys count in attention as a bias says."""
        if bias is None:
            yield
            return
        self._weights = bias
        self._model.replace_attention(weighted_attend(bias))
        try:
            yield
        finally:
            self._model.replace_attention(attend)
            self._weights = None

    def _applied(
        self, stacks: Sequence[Stack], passes: Sequence[int]
    ) -> AbstractContextManager[None]:
        """Within, some passes of a batch are drawn with their adapters."""
        if self._lora is None or not stacks:
            return contextlib.nullcontext()
        return self._lora.applied([stacks[i] for i in passes])

    def _through_caches(
        self,
        blocks: _Blocks,
        streams: list[torch.Tensor],
        caches: Sequence[StepCache | None],
        stacks: Sequence[Stack],
    ) -> torch.Tensor:
        before = streams[0]
        blocks.first(streams)
        after, text = streams
        first = after - before
        fits = fitting(caches, first)
        run = [i for i, fit in enumerate(fits) if not fit]
        out = after.clone()
        if run:
            with self._applied(stacks, run):
                out[run] = blocks.only(run).rest([after[run], text[run]])
        for i, cache in enumerate(caches):
            if cache is None:
                continue
            if fits[i] and cache.rest is not None:
                cache.used += 1
                out[i] = after[i] + cache.rest
            else:
                cache.first, cache.rest = first[i], out[i] - after[i]
        return out

    def _rotary(self, bucket: Bucket, device: torch.device) -> Rotary:
        found = self._layouts.get(bucket)
        if found is None:
            found = rotary_tables(self._model, bucket, device)
            self._layouts[bucket] = found
            if len(self._layouts) > _LAYOUTS_KEPT:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(bucket)
        return found


def rotary_tables(model: Transformer, bucket: Bucket, device: torch.device) -> Rotary:
    """Position tables of text tokens, image tokens and reference tokens, in this order."""
    ids = [text_ids(bucket.text_tokens), image_ids(TokenGrid(bucket.rows, bucket.columns))]
    times = bucket.times or tuple(10 + 10 * i for i in range(len(bucket.references)))
    ids += [image_ids(TokenGrid(*g), t) for g, t in zip(bucket.references, times, strict=True)]
    tables = [model.rotary(part.to(device)) for part in ids]
    return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])


@dataclass(slots=True)
class _Blocks:
    """The transformer's blocks at one step; the first one apart from the others."""

    doubles: list[Any]
    singles: list[Any]
    rotary: Rotary
    image_mod: torch.Tensor
    text_mod: torch.Tensor
    joint_mod: torch.Tensor
    hints: Hints = field(default_factory=Hints)

    def only(self, passes: list[int]) -> _Blocks:
        """The same for some of the passes."""
        mods = (self.image_mod[passes], self.text_mod[passes], self.joint_mod[passes])
        hints = self.hints.only(passes)
        return _Blocks(self.doubles, self.singles, self.rotary, *mods, hints)

    def first(self, streams: list[torch.Tensor]) -> None:
        """Puts image and text tokens, in this order, through the first block, in place."""
        self._double(0, streams)

    def rest(self, streams: list[torch.Tensor]) -> torch.Tensor:
        """Image tokens after the blocks behind the first one.

        Takes the streams out of the list, so that they are freed while the blocks run.
        """
        for layer in range(1, len(self.doubles)):
            self._double(layer, streams)
        length = streams[1].shape[1]
        joint = torch.cat(streams[::-1], dim=1)
        streams.clear()
        for block in self.singles:
            joint = block(joint, self.joint_mod, self.rotary)
        return joint[:, length:]

    def _double(self, layer: int, streams: list[torch.Tensor]) -> None:
        block = self.doubles[layer]
        image, text = block(*streams, self.image_mod, self.text_mod, self.rotary)
        streams[:] = self.hints.add(layer, image), text

"""Samples on the way: drawn by the serving engine, with the adapter as a file, as it will serve.

The same denoiser in memory, the same sampler, guidance and adapter store as a replica has; nothing
of the trainer's own arithmetic is in a sample. What looks right here looks the same when it serves.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.core.request import (
    AdapterRef,
    Failed,
    Finished,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import Components

_NAME = "sample"
_LOAD_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """What is drawn: each prompt once, with seed + its place."""

    prompts: tuple[str, ...]
    size: ImageSize
    steps: int
    guidance: float
    seed: int = 0


class Sampler:
    """Draws a run's sample prompts with an adapter file.

    Args:
        components: the model that is trained on, with its autoencoder.
        embeds: of the prompts, [prompts, text tokens, width]; the encoder is gone by now.
        max_rank: of the adapter.
    """

    def __init__(
        self, components: Components, settings: SampleSettings, embeds: torch.Tensor, max_rank: int
    ) -> None:
        self._settings, self._embeds = settings, embeds
        store = AdapterStore(components.denoiser, max_rank=max_rank)
        self._engine = Engine(components, adapters=store)

    def draw(self, adapter: pathlib.Path) -> Sequence[NDArray[np.uint8]]:
        """One picture [height, width, 3] of each prompt.

        Raises:
            AdapterLoadFailed: the file cannot be served.
            EngineError: a picture cannot be drawn.
        """
        settings, engine = self._settings, self._engine
        engine.adapters.unload(_NAME)
        engine.adapters.load(_NAME, adapter, wait=_LOAD_SECONDS)
        for place, prompt in enumerate(settings.prompts):
            request = GenerationRequest(
                id=f"sample-{place}",
                prompt=prompt,
                size=settings.size,
                rendered_size=settings.size,
                sampling=SamplingParams(settings.steps, settings.guidance, "flow-euler"),
                seed=settings.seed + place,
                adapters=(AdapterRef(_NAME, 1.0),),
            )
            engine.add(request, self._embeds[place])
        found: dict[str, NDArray[np.uint8]] = {}
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    found[event.request_id] = event.images[0]
        if len(found) < len(settings.prompts):
            raise AdapterLoadFailed("The engine drew fewer samples than it was asked for.")
        return [found[f"sample-{place}"] for place in range(len(settings.prompts))]

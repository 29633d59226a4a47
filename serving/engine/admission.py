"""From a request to the state that the engine draws it from: every check that needs the model.

Called by `engine.Engine.add`; raises before anything is taken in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from calotype.serving.engine.adapters import AdapterStore
from calotype.serving.engine.batch import DenoiseState, Row
from calotype.serving.engine.components import Components
from calotype.serving.engine.latents import TokenGrid
from calotype.serving.engine.samplers import build_sampler
from calotype.serving.engine.scheduler import Bucket
from calotype.serving.engine.text_encoder import PromptEmbeds
from calotype.serving.errors import InvalidRequest, NotFound
from calotype.serving.request import MAX_SEED, GenerationRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Admission:
    """Checks requests against one model.

    Args:
        pixels_per_token: side of the square of pixels that one image token stands for.
    """

    def __init__(
        self, components: Components, adapters: AdapterStore, pixels_per_token: int
    ) -> None:
        self._components = components
        self._adapters = adapters
        self._side = pixels_per_token
        self._joint_dim: int = components.denoiser.config.joint_attention_dim

    def prepare(
        self, request: GenerationRequest, given: PromptEmbeds | NDArray[np.float32] | None
    ) -> DenoiseState:
        """The state of a request before its first step.

        Raises:
            InvalidRequest: the request cannot be drawn by this model.
            NotFound: it names an adapter that was never loaded.
        """
        side, size = self._side, request.rendered_size
        if min(size.width, size.height) < side or size.width % side or size.height % side:
            raise InvalidRequest(
                f"size must be a multiple of {side} pixels, for example "
                f"{max(side, size.width // side * side)}x{max(side, size.height // side * side)}; "
                f"got {size}.",
                param="size",
            )
        if request.n < 1:
            raise InvalidRequest(f"n must be at least 1; got {request.n}.", param="n")
        if request.sampling.steps < 1:
            raise InvalidRequest(
                f"steps must be at least 1; got {request.sampling.steps}.", param="steps"
            )
        if not 0 <= request.seed <= MAX_SEED:
            raise InvalidRequest(f"seed must be 0 to {MAX_SEED}; got {request.seed}.", param="seed")
        if not math.isfinite(request.sampling.guidance_scale):
            raise InvalidRequest("guidance_scale must be a finite number.", param="guidance_scale")
        known = self._adapters.states() if request.adapters else {}
        for ref in request.adapters:
            if ref.name not in known:
                raise NotFound(f"There is no LoRA adapter {ref.name!r}.", param="loras")
            if not math.isfinite(ref.scale):
                raise InvalidRequest(
                    f"The scale of {ref.name!r} must be a finite number.", param="loras"
                )
        grid = TokenGrid(size.height // side, size.width // side)
        embeds = self._embeds(request, given)
        rows = [
            Row(
                request.id,
                index,
                request.seed + index,
                build_sampler(
                    request.sampling.sampler,
                    self._components.schedule,
                    request.sampling.steps,
                    grid.tokens,
                    self._components.dtype,
                ),
                request.sampling.guidance_scale,
                embeds,
            )
            for index in range(request.n)
        ]
        bucket = Bucket(grid.rows, grid.columns, embeds.shape[0])
        return DenoiseState(request, bucket, grid, rows)

    def _embeds(
        self, request: GenerationRequest, given: PromptEmbeds | NDArray[np.float32] | None
    ) -> torch.Tensor:
        if given is None:
            if self._components.text_encoder is None:
                raise InvalidRequest(
                    "this engine has no text encoder; give the prompt's embeddings.",
                    param="prompt",
                )
            given = self._components.text_encoder.encode([request.prompt])[0]
        # A copy of an array: those that Ray hands over are read-only shared memory.
        embeds = given.embeds if isinstance(given, PromptEmbeds) else torch.tensor(given)
        # The padding is part of the function: shorter embeddings would draw another picture.
        wanted = (self._components.settings.max_sequence_length, self._joint_dim)
        if tuple(embeds.shape) != wanted:
            raise InvalidRequest(
                f"embeddings must be of shape {list(wanted)}; got {list(embeds.shape)}.",
                param="prompt",
            )
        return embeds.to(self._components.device, self._components.dtype)

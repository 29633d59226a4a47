"""From a request to the state that the engine draws it from: every check that needs the model.

Called by `engine.Engine.add`; raises before anything is taken in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from calotype.serving.core.conditions import acts, check_controls, check_references
from calotype.serving.core.errors import AdapterLoadFailed, InvalidRequest, NotFound
from calotype.serving.core.request import MAX_SEED, GenerationRequest, check_sigmas
from calotype.serving.engine.control.branch import ControlBranch
from calotype.serving.engine.control.contexts import ControlContexts
from calotype.serving.engine.control.control_store import ControlStore, unknown
from calotype.serving.engine.control.hints import Control, Controls
from calotype.serving.engine.control.preprocessors import read_maps
from calotype.serving.engine.execution.batch import DenoiseState, Pass, Row
from calotype.serving.engine.execution.checkpoint import check_adapters
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.model.conditioning import Conditioner, Conditions
from calotype.serving.engine.model.input_images import read_inputs
from calotype.serving.engine.model.latents import TokenGrid
from calotype.serving.engine.model.text_encoder import PromptEmbeds
from calotype.serving.engine.sampling.guidance import Guidance, plan_guidance, prompts_of
from calotype.serving.engine.sampling.noise import NoiseSource
from calotype.serving.engine.sampling.samplers import build_sampler
from calotype.serving.engine.sampling.schedule import Schedule, build_schedule
from calotype.serving.engine.sampling.step_cache import StepCache
from calotype.serving.engine.scheduling.scheduler import Bucket

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Embeds = PromptEmbeds | NDArray[np.float32] | torch.Tensor
    """An encoded prompt, [text tokens, joint_attention_dim]."""


_STRENGTH = 0.8
"""How far a given image is noised where a request does not say."""


class Admission:
    """Checks requests against one model.

    Args:
        stores: the LoRA adapters and the control adapters that requests may name.
        conditioner: what knows how given images become tokens.
        pixels_per_token: side of the square of pixels that one image token stands for.
        max_steps: most denoise steps of a request.
        devices: that draw each image together.
    """

    def __init__(
        self,
        components: Components,
        stores: tuple[AdapterStore, ControlStore],
        conditioner: Conditioner,
        pixels_per_token: int,
        max_steps: int,
        devices: int = 1,
    ) -> None:
        self._components = components
        self._devices = devices
        self._adapters, self._controls = stores
        self._contexts = ControlContexts(conditioner, components.denoiser.config)
        self._conditioner = conditioner
        self._side = pixels_per_token
        self._max_steps = max_steps
        self._joint_dim: int = components.denoiser.config.joint_attention_dim

    def prepare(
        self,
        request: GenerationRequest,
        embeds: Embeds | None,
        negative: Embeds | None,
        files: Mapping[str, bytes],
    ) -> DenoiseState:
        """The state of a request before its first step.

        Raises:
            InvalidRequest: the request cannot be drawn by this model.
            NotFound: it names an adapter that was never loaded.
        """
        self._check_size(request)
        _check_numbers(request, self._max_steps)
        if request.sampling.step_cache and self._devices > 1:
            raise InvalidRequest(
                f"step_cache must be 0: {self._devices} devices draw each picture of this model, "
                "and they draw every step whole.",
                param="step_cache",
            )
        self._check_adapters(request)
        self._check_conditions(request)
        side, size = self._side, request.rendered_size
        grid = TokenGrid(size.height // side, size.width // side)
        two = self._components.settings.needs_two_passes
        inputs = read_inputs(request, files, side)
        maps = read_maps(request.controls, files, size)
        guidance = plan_guidance(request, needs_two_passes=two)
        encoded = [
            self._embeds(text, given)
            for text, given in zip(
                prompts_of(request, needs_two_passes=two), (embeds, negative), strict=False
            )
        ]
        schedule = build_schedule(
            self._components.schedule,
            request.sampling.steps,
            grid.tokens,
            self._components.dtype,
            sigmas=request.sampling.sigmas,
            strength=_strength(request),
        )
        rows = [_row(request, index, schedule, guidance, encoded) for index in range(request.n)]
        layout = self._conditioner.layout(inputs)
        bucket = Bucket(grid.rows, grid.columns, encoded[0].shape[0], layout)
        return DenoiseState(request, bucket, grid, rows, schedule.steps, inputs, maps)

    def start(self, state: DenoiseState) -> bool:
        """Gets what a request needs for its first step; False while an adapter is being read.

        Takes every adapter of the request or none, and encodes its images.

        Raises:
            AdapterLoadFailed: an adapter cannot be used.
            InvalidRequest: its checkpoint was taken with other adapters.
        """
        refs = [ref for ref in state.request.adapters if ref.scale != 0.0]
        for ref in refs:
            try:
                adapter = self._adapters.acquire(ref.name)
            except AdapterLoadFailed as error:
                raise _naming(ref.name, error) from error
            if adapter is None:
                self.release(state)
                return False
            state.pinned.append(adapter)
        controls = self._acquired(state)
        if controls is None:
            self.release(state)
            return False
        check_adapters(state)
        stack = tuple((a, ref.scale) for a, ref in zip(state.pinned, refs, strict=True))
        conditions = Conditions()
        if state.inputs.start is not None or state.inputs.references:
            conditions = self._conditioner.encode(state.inputs)
            conditions.uses = state.request.reference_uses
            state.inputs = dataclasses.replace(state.inputs, references=())
        for row in state.rows:
            row.stack, row.conditions, row.controls = stack, conditions, controls
        return True

    def _acquired(self, state: DenoiseState) -> Controls | None:
        """The controls of a request; None while a branch is being read.

        Raises:
            AdapterLoadFailed: a branch cannot be used.
        """
        # One at scale 0, or never on, changes nothing: it is not even read.
        wanted = [
            (ref, pixels)
            for ref, pixels in zip(state.request.controls, state.maps, strict=True)
            if ref.scale != 0
            and any(acts(ref.start, ref.end, step, state.steps) for step in range(state.steps))
        ]
        branches: list[ControlBranch] = []
        for ref, _ in wanted:
            try:
                branch = self._controls.acquire(ref.name)
            except AdapterLoadFailed as error:
                raise _naming(ref.name, error, "controlnets") from error
            if branch is None:
                return None
            branches.append(branch)
        return tuple(
            Control(branch, self._contexts.of(pixels), ref.scale, ref.start, ref.end)
            for branch, (ref, pixels) in zip(branches, wanted, strict=True)
        )

    def release(self, state: DenoiseState) -> None:
        """Gives a request's adapters back."""
        for adapter in state.pinned:
            self._adapters.release(adapter)
        state.pinned = []

    def _check_size(self, request: GenerationRequest) -> None:
        side, size = self._side, request.rendered_size
        if min(size.width, size.height) < side or size.width % side or size.height % side:
            raise InvalidRequest(
                f"size must be a multiple of {side} pixels, for example "
                f"{max(side, size.width // side * side)}x{max(side, size.height // side * side)}; "
                f"got {size}.",
                param="size",
            )

    def _check_adapters(self, request: GenerationRequest) -> None:
        known = self._adapters.states() if request.adapters else {}
        for ref in request.adapters:
            if ref.name not in known:
                raise NotFound(f"There is no LoRA adapter {ref.name!r}.", param="loras")
            if not math.isfinite(ref.scale):
                raise InvalidRequest(
                    f"The scale of {ref.name!r} must be a finite number.", param="loras"
                )

    def _check_conditions(self, request: GenerationRequest) -> None:
        check_controls(request.controls)
        check_references(request.reference_uses)
        known = self._controls.states() if request.controls else {}
        for control in request.controls:
            if control.name not in known:
                raise unknown(control.name)
        weighted = any(use.strength != 1 for use in request.reference_uses)
        if self._devices > 1 and (request.controls or weighted):
            what = "controlnets" if request.controls else "strength of reference_images"
            raise InvalidRequest(
                f"{what} must be left out: {self._devices} devices draw each picture of this "
                "model, which cannot be done with it.",
                param="controlnets" if request.controls else "reference_images",
            )
        if request.reference_uses and len(request.reference_uses) != len(request.references):
            raise InvalidRequest(
                f"reference_uses has {len(request.reference_uses)} entries for "
                f"{len(request.references)} references; give one for each, or none.",
                param="reference_images",
            )

    def _embeds(self, prompt: str, given: Embeds | None) -> torch.Tensor:
        if given is None:
            if self._components.text_encoder is None:
                raise InvalidRequest(
                    "this engine has no text encoder; give the prompt's embeddings.",
                    param="prompt",
                )
            given = self._components.text_encoder.encode([prompt])[0]
        # A copy of an array: those that Ray hands over are read-only shared memory.
        if isinstance(given, PromptEmbeds):
            given = given.embeds
        embeds = given if isinstance(given, torch.Tensor) else torch.tensor(given)
        # The padding is part of the function: shorter embeddings would draw another image.
        wanted = (self._components.settings.max_sequence_length, self._joint_dim)
        if tuple(embeds.shape) != wanted:
            raise InvalidRequest(
                f"embeddings must be of shape {list(wanted)}; got {list(embeds.shape)}.",
                param="prompt",
            )
        return embeds.to(self._components.device, self._components.dtype)


def _naming(name: str, error: AdapterLoadFailed, param: str = "loras") -> AdapterLoadFailed:
    """The error as whoever asked may see it: without the path of the file."""
    reason = error.message.replace(error.param or error.message, "its file")
    return AdapterLoadFailed(f"The adapter {name!r} cannot be used: {reason}", error.code, param)


def _row(
    request: GenerationRequest,
    index: int,
    schedule: Schedule,
    guidance: Guidance,
    encoded: Sequence[torch.Tensor],
) -> Row:
    noise = NoiseSource(request.seed + index)
    share = request.sampling.step_cache
    passes = tuple(
        Pass(embeds, guidance.embedded, StepCache(share) if share else None) for embeds in encoded
    )
    return Row(
        request.id,
        index,
        request.seed + index,
        build_sampler(request.sampling.sampler, schedule, noise),
        noise,
        passes,
        guidance.true,
        steps=schedule.steps,
    )


def _check_numbers(request: GenerationRequest, max_steps: int) -> None:
    sampling = request.sampling
    if request.n < 1:
        raise InvalidRequest(f"n must be at least 1; got {request.n}.", param="n")
    if not 1 <= sampling.steps <= max_steps:
        raise InvalidRequest(
            f"steps must be 1 to {max_steps}; got {sampling.steps}.", param="steps"
        )
    if not (math.isfinite(request.weight) and request.weight > 0):
        raise InvalidRequest(f"weight must be above 0; got {request.weight}.", param="weight")
    if request.deadline_seconds is not None and not request.deadline_seconds > 0:
        raise InvalidRequest(
            f"deadline_seconds must be above 0; got {request.deadline_seconds}.",
            param="deadline_seconds",
        )
    if not 0 <= request.seed <= MAX_SEED:
        raise InvalidRequest(f"seed must be 0 to {MAX_SEED}; got {request.seed}.", param="seed")
    finite: Mapping[str, float | None] = {
        "guidance_scale": sampling.guidance_scale,
        "true_guidance_scale": sampling.true_guidance_scale,
        "step_cache": sampling.step_cache,
    }
    for name, value in finite.items():
        if value is not None and not math.isfinite(value):
            raise InvalidRequest(f"{name} must be a finite number.", param=name)
    if not 0 <= sampling.step_cache < 1:
        raise InvalidRequest(
            f"step_cache must be at least 0 and below 1; got {sampling.step_cache}.",
            param="step_cache",
        )
    check_sigmas(sampling.sigmas, sampling.steps)


def _strength(request: GenerationRequest) -> float:
    """Share of the steps that is run; all of them where nothing is started from."""
    if request.image is None:
        return 1.0
    if request.strength is None:
        return _STRENGTH if request.mask is None and request.expand is None else 1.0
    # Written so that NaN fails, too.
    if not 0 < request.strength <= 1:
        raise InvalidRequest(
            f"strength must be above 0 and at most 1; got {request.strength}.", param="strength"
        )
    return request.strength

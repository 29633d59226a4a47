"""How closely a prompt is followed: given to the denoiser, or weighed between two passes.

FLUX.2 [dev] is distilled: it is given a guidance and runs once a step. With a negative prompt the
image runs twice, and the velocity is ``n + g (p - n)`` for prompt p, negative prompt n and
guidance g ("classifier-free guidance", arXiv 2207.12598): twice the cost. The denoiser is then
given no guidance of its own (1), unless the request asks for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from calotype.serving.core.request import GenerationRequest, SamplingParams

NOT_GUIDED = 1.0
"""The guidance at which a distilled model follows its prompt as it was trained, and no closer."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """How a request is guided.

    Attributes:
        embedded: scale that the denoiser is given.
        true: weight of the prompt against the negative prompt; 1 needs no second pass.
    """

    embedded: float
    true: float

    @property
    def passes(self) -> int:
        return 1 if self.true == 1.0 else 2


def plan_guidance(request: GenerationRequest, *, needs_two_passes: bool) -> Guidance:
    """How a request is guided.

    Args:
        needs_two_passes: the model is not distilled, so that it follows a prompt only with a
            second pass; where a request names no negative prompt, the empty one is meant.
    """
    sampling: SamplingParams = request.sampling
    if request.negative_prompt is None and not needs_two_passes:
        return Guidance(sampling.guidance_scale, 1.0)
    if sampling.true_guidance_scale is not None:
        return Guidance(sampling.guidance_scale, sampling.true_guidance_scale)
    return Guidance(NOT_GUIDED, sampling.guidance_scale)


def prompts_of(request: GenerationRequest, *, needs_two_passes: bool) -> tuple[str, ...]:
    """The texts that must be encoded: the prompt, and the negative one if a second pass runs."""
    if plan_guidance(request, needs_two_passes=needs_two_passes).passes == 1:
        return (request.prompt,)
    return (request.prompt, request.negative_prompt or "")

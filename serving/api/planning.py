"""From what a client wrote to what is drawn: defaults, presets, limits."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from calotype.serving.api.catalog import Catalog
from calotype.serving.api.schemas import GenerationBody
from calotype.serving.config import ImageModel
from calotype.serving.errors import InvalidRequest
from calotype.serving.request import MAX_SEED, GenerationRequest, ImageSize, SamplingParams

PRIORITIES = {"low": -1, "normal": 0, "high": 1}

# OpenAI's names of other generations for the same thing.
_QUALITY_NAMES = {"auto": "medium", "standard": "medium", "hd": "high"}

_STYLE_WORDS = {
    "vivid": "vivid colours, dramatic light",
    "natural": "natural colours, plain light",
}


@dataclass(frozen=True, slots=True)
class PlannedGeneration:
    """Everything that is decided before a job exists."""

    model: ImageModel
    request: GenerationRequest
    input: dict[str, Any]


def plan_generation(
    catalog: Catalog, body: GenerationBody, job_id: str, request_id: str
) -> PlannedGeneration:
    """Checks ``body`` against the model that it names and fills in what it leaves out.

    Raises:
        NotFound: no such model or adapter.
        InvalidRequest: a value is out of the model's limits.
    """
    model = catalog.model(body.model)
    limits = model.spec.limits
    if not body.prompt.strip():
        raise InvalidRequest("prompt must not be empty.", param="prompt")
    if len(body.prompt) > limits.max_prompt_chars:
        raise InvalidRequest(
            f"prompt has {len(body.prompt):,} characters; at most {limits.max_prompt_chars:,} "
            "are possible.",
            param="prompt",
        )
    if body.n > limits.max_images:
        raise InvalidRequest(
            f"n is {body.n}; {model.name} draws at most {limits.max_images} pictures per request.",
            param="n",
        )
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    if seed + body.n - 1 > MAX_SEED:
        raise InvalidRequest(
            f"seed + n - 1 must not exceed {MAX_SEED}: picture i is drawn with seed + i.",
            param="seed",
        )
    size, rendered_size = _sizes(model, body)
    prompt = body.prompt
    if body.style is not None:
        prompt = f"{prompt}, {_STYLE_WORDS[body.style]}"
    request = GenerationRequest(
        id=job_id,
        prompt=prompt,
        size=size,
        rendered_size=rendered_size,
        sampling=SamplingParams(
            steps=_steps(model, body),
            guidance_scale=(
                model.spec.defaults.guidance_scale
                if body.guidance_scale is None
                else body.guidance_scale
            ),
            sampler=body.sampler or model.spec.defaults.sampler,
        ),
        seed=seed,
        n=body.n,
        adapters=catalog.adapter_refs(model, [(lora.id, lora.scale) for lora in body.loras]),
        priority=PRIORITIES[body.priority],
    )
    return PlannedGeneration(model, request, _input(body, request, request_id))


def _sizes(model: ImageModel, body: GenerationBody) -> tuple[ImageSize, ImageSize]:
    if body.width is not None and body.height is not None:
        size, param = ImageSize(body.width, body.height), "width"
    elif body.size is None or body.size == "auto":
        size, param = ImageSize.parse(model.spec.defaults.size), "size"
    else:
        size, param = ImageSize.parse(body.size), "size"
    return size, model.spec.check_size(size, param)


def _steps(model: ImageModel, body: GenerationBody) -> int:
    most = model.spec.limits.max_steps
    if body.steps is not None:
        if body.steps > most:
            raise InvalidRequest(
                f"steps is {body.steps}; {model.name} takes at most {most}.", param="steps"
            )
        return body.steps
    presets = {str(name): preset.steps for name, preset in model.spec.quality_presets.items()}
    # "auto" and "standard" mean the model's own default, whatever the presets say.
    wanted = "" if body.quality in ("auto", "standard") else quality_name(body.quality)
    return min(most, presets.get(wanted, model.spec.defaults.steps))


def quality_name(quality: str) -> str:
    """``low``, ``medium`` or ``high``: the only answers that OpenAI's clients know."""
    return _QUALITY_NAMES.get(quality, quality)


def _input(body: GenerationBody, request: GenerationRequest, request_id: str) -> dict[str, Any]:
    """The job's ``input``: what was asked after defaults, and how to encode and answer it."""
    wanted: dict[str, Any] = {
        "prompt": body.prompt,
        "model": body.model,
        "n": request.n,
        "size": str(request.size),
        "quality": quality_name(body.quality),
        "seed": request.seed,
        "steps": request.sampling.steps,
        "guidance_scale": request.sampling.guidance_scale,
        "loras": [{"id": ref.name, "scale": ref.scale} for ref in request.adapters],
        "output_format": body.output_format,
        "output_compression": body.output_compression,
        "response_format": body.response_format,
        "request_id": request_id,
    }
    if body.style is not None:
        wanted |= {"style": body.style, "revised_prompt": request.prompt}
    if body.safety_identifier or body.user:
        wanted["safety_identifier"] = body.safety_identifier or body.user
    if body.moderation == "low":
        wanted["warnings"] = [
            "moderation 'low' is not granted by this service's policy; 'auto' was used."
        ]
    return wanted

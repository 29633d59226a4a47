"""From what a client wrote to what is drawn: defaults, presets, limits."""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from calotype.serving.api.generation.access import level_parameters, requested_level
from calotype.serving.api.generation.recipes import adapter_digest, model_digest
from calotype.serving.api.generation.sizes import choose_size
from calotype.serving.api.generation.uploads import Images
from calotype.serving.api.http.schemas import EditBody, GenerationBody, VariationBody
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.config import ImageModel
from calotype.serving.core.conditions import ControlRef, check_controls, check_references
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import (
    MAX_SEED,
    GenerationRequest,
    Margins,
    SamplingParams,
    check_sigmas,
    sampler_names,
)
from calotype.serving.jobs.recipe import make_recipe
from calotype.serving.jobs.records import TeamRecord

PRIORITIES = {"low": -1, "normal": 0, "high": 1}

# OpenAI's names of other generations for the same thing.
_QUALITY_NAMES = {"auto": "medium", "standard": "medium", "hd": "high"}

_LORA = re.compile(r"<lora:([^:<>]{1,80})(?::(\d{1,3}(?:\.\d{1,3})?))?>")

_STYLE_WORDS = {
    "vivid": "vivid colours, dramatic light",
    "natural": "natural colours, plain light",
}


@dataclass(frozen=True, slots=True)
class PlannedGeneration:
    """Everything that is decided before a job exists."""

    model: ImageModel
    request: GenerationRequest
    input: JsonObject
    recipe: JsonObject
    requested_level: str | None = None
    """How strictly the caller wants to be checked (`access.requested_level`)."""


def plan_generation(
    catalog: Catalog,
    body: GenerationBody,
    job_id: str,
    request_id: str,
    features: Collection[str] = (),
    images: Images | None = None,
    team: TeamRecord | None = None,
) -> PlannedGeneration:
    """Checks ``body`` against the model that it names and fills in what it leaves out.

    Args:
        features: what the workers can do (`settings.FEATURES`).
        team: which asks; None = one that may use everything.

    Raises:
        NotFound: no such model or adapter for this team.
        InvalidRequest: a value is out of the model's limits.
    """
    model = catalog.model(body.model, team)
    limits = model.spec.limits
    operation = _operation(body)
    if operation != "variation" and not body.prompt.strip():
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
    given = images or Images()
    if len(given.references) > limits.max_reference_images:
        raise InvalidRequest(
            f"The request has {len(given.references)} reference pictures; {model.name} takes at "
            f"most {limits.max_reference_images}.",
            param="reference_images",
        )
    check_references(given.uses)
    steps = _steps(model, body)
    check_sigmas(body.sigmas or (), steps)
    margins = _margins(body, given)
    chosen = choose_size(model, body, given, margins)
    prompt = body.prompt
    if body.style is not None:
        prompt = f"{prompt}, {_STYLE_WORDS[body.style]}"
    request = GenerationRequest(
        id=job_id,
        prompt=prompt,
        size=chosen.size,
        rendered_size=chosen.rendered_size,
        sampling=SamplingParams(
            steps=steps,
            guidance_scale=(
                model.spec.defaults.guidance_scale
                if body.guidance_scale is None
                else body.guidance_scale
            ),
            sampler=_sampler(model, body, features),
            sigmas=tuple(body.sigmas or ()),
            step_cache=_step_cache(model, body),
        ),
        seed=seed,
        n=body.n,
        adapters=catalog.adapter_refs(model, [(lora.id, lora.scale) for lora in body.loras], team),
        preview_every=_preview_every(model, body, features),
        priority=PRIORITIES[body.priority],
        negative_prompt=body.negative_prompt or None,
        image=given.image,
        mask=given.mask,
        references=given.references,
        reference_uses=given.uses,
        controls=_controls(catalog, model, given, team),
        strength=body.strength,
        expand=margins,
    )
    recipe = make_recipe(
        request.to_payload(),
        operation=operation,
        model={"name": model.name, "digest": model_digest(model)},
        adapter_digests={
            adapter.name: adapter_digest(adapter)
            for adapter in catalog.adapters(model.name)
            if adapter.name in request.adapter_names
        },
        output={"format": body.output_format, "compression": body.output_compression},
    )
    given_input = _input(body, request, request_id) | level_parameters(body)
    warnings = [*filter(None, (chosen.warning, _lora_in_prompt(body.prompt)))]
    if warnings:
        given_input["warnings"] = warnings
    return PlannedGeneration(
        model, request, given_input, recipe | level_parameters(body), requested_level(body)
    )


def _lora_in_prompt(prompt: str) -> str | None:
    """What to write instead of the web UIs' way to name an adapter, which is only words here."""
    found = _LORA.search(prompt)
    if found is None:
        return None
    entry = {"id": found[1], "scale": float(found[2] or 1)}
    return (
        f"The prompt holds {found[0]!r}, which names no adapter here; leave it out and give "
        f"loras: [{json.dumps(entry)}]."
    )


def _controls(
    catalog: Catalog, model: ImageModel, given: Images, team: TeamRecord | None
) -> tuple[ControlRef, ...]:
    controls = []
    for place, control in enumerate(given.controls):
        where = f"controlnets[{place}]"
        scale = catalog.control_scale(model, control.name, control.scale, where, team)
        controls.append(
            ControlRef(control.name, control.image, control.type, scale, control.start, control.end)
        )
    found = tuple(controls)
    check_controls(found)
    if found and model.spec.acceleration.devices_per_picture > 1:
        raise InvalidRequest(
            f"controlnets must be left out: {model.spec.acceleration.devices_per_picture} devices "
            f"draw each picture of {model.name}, which cannot be done with them.",
            param="controlnets",
        )
    return found


def _operation(body: GenerationBody) -> str:
    if isinstance(body, VariationBody):
        return "variation"
    return "edit" if isinstance(body, EditBody) else "generate"


@functools.cache
def _samplers() -> tuple[str, ...]:
    """Once: it looks through every installed package, which takes longer than all the rest."""
    return sampler_names()


def _sampler(model: ImageModel, body: GenerationBody, features: Collection[str]) -> str:
    default = str(model.spec.defaults.sampler)
    wanted = body.sampler or default
    known = _samplers() if "samplers" in features else (default,)
    if wanted not in known:
        raise InvalidRequest(
            f"sampler {wanted!r} is not known; it must be one of {', '.join(known)}.",
            param="sampler",
        )
    return wanted


def _preview_every(model: ImageModel, body: GenerationBody, features: Collection[str]) -> int:
    """Steps between previews, so that `partial_images` of them come before the end."""
    if not body.partial_images or "previews" not in features:
        return 0
    return max(1, _steps(model, body) // (body.partial_images + 1))


def _step_cache(model: ImageModel, body: GenerationBody) -> float:
    own = model.spec.acceleration
    if body.step_cache and own.devices_per_picture > 1:
        raise InvalidRequest(
            f"step_cache must be 0 or left out: {own.devices_per_picture} devices draw each "
            f"picture of {model.name}, and they draw every step whole.",
            param="step_cache",
        )
    return float(own.step_cache if body.step_cache is None else body.step_cache)


def _margins(body: GenerationBody, given: Images) -> Margins | None:
    wanted = body.expand
    if wanted is None:
        return None
    margins = Margins(wanted.left, wanted.top, wanted.right, wanted.bottom)
    if margins == Margins() or given.image is None:
        raise InvalidRequest(
            "expand needs an image and, at one of its edges at least, a margin above 0, for "
            "example {'right': 64}.",
            param="expand",
        )
    return margins


def _steps(model: ImageModel, body: GenerationBody) -> int:
    most = model.spec.limits.max_steps
    wanted, param = body.steps, "steps"
    if wanted is None and body.sigmas:
        wanted, param = len(body.sigmas), "sigmas"
    if wanted is not None:
        if wanted > most:
            raise InvalidRequest(
                f"steps is {wanted}; {model.name} takes at most {most}.", param=param
            )
        return wanted
    presets = {str(name): preset.steps for name, preset in model.spec.quality_presets.items()}
    # "auto" and "standard" mean the model's own default, whatever the presets say.
    preset = "" if body.quality in ("auto", "standard") else quality_name(body.quality)
    return min(most, presets.get(preset, model.spec.defaults.steps))


def quality_name(quality: str) -> str:
    """``low``, ``medium`` or ``high``: the only answers that OpenAI's clients know."""
    return _QUALITY_NAMES.get(quality, quality)


def _usual_format(body: GenerationBody) -> str:
    """OpenAI's default: links for DALL-E's names, bytes for all others, and in streams."""
    return "url" if (body.model or "").startswith("dall-e-") and not body.stream else "b64_json"


def _input(body: GenerationBody, request: GenerationRequest, request_id: str) -> JsonObject:
    """The job's ``input``: what was asked after defaults, and how to encode and answer it."""
    wanted: JsonObject = {
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
        "response_format": body.response_format or _usual_format(body),
        "request_id": request_id,
    }
    if request.controls:
        wanted["controlnets"] = [
            {k: v for k, v in control.to_payload().items() if k != "image"}
            for control in request.controls
        ]
    if request.reference_uses:
        wanted["reference_images"] = [use.to_payload() for use in request.reference_uses]
    if body.stream:
        wanted |= {"stream": True, "partial_images": body.partial_images}
    if body.style is not None:
        wanted |= {"style": body.style, "revised_prompt": request.prompt}
    if body.safety_identifier or body.user:
        wanted["safety_identifier"] = body.safety_identifier or body.user
    return wanted

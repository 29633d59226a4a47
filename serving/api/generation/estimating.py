"""What a picture will cost before it is drawn: tokens, and how much they weigh against none.

A denoise step costs what its tokens cost: those of the text, of the picture and of the references
that it looks at. A control branch puts them through its own blocks once more.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from calotype.serving.api.state.gateway import Gateway
from calotype.serving.config import ImageModel
from calotype.serving.core.conditions import ReferenceUse, acts
from calotype.serving.core.errors import EngineError
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import GenerationRequest, ImageSize
from calotype.serving.engine.model.input_images import reference_tokens
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.settings import read_json, read_settings
from calotype.serving.jobs.predictor import Work
from calotype.serving.jobs.result import TOKEN_SIDE, image_tokens
from calotype.serving.weights.sources import model_folder

_TEXT_TOKENS = 512
"""Of FLUX.2: every prompt is padded to so many."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides the cost of a token.

    Attributes:
        control_share: what a control branch adds to a token's cost.
    """

    text_tokens: int
    control_share: float


def shape_of(model: ImageModel) -> ModelShape:
    """By the model's files where this process sees them, else as FLUX.2 [dev] is."""
    config, text = TransformerConfig(), _TEXT_TOKENS
    source = model.spec.source
    if source.built_in is not None or (source.path and pathlib.Path(source.path).is_dir()):
        try:
            folder = model_folder(model)
            config = TransformerConfig.from_json(read_json(folder / "transformer" / "config.json"))
            text = read_settings(folder).max_sequence_length
        except (EngineError, TypeError):
            pass  # the replicas have it, and say what is wrong
    return ModelShape(text, _control_share(config))


def _control_share(config: TransformerConfig) -> float:
    """A token takes 13 products of width x width in a block of either kind; 8 % for [dev]."""
    branch = len(range(0, config.num_layers, 2))
    return (13 * branch + branch + 1) / (13 * (config.num_layers + config.num_single_layers))


def estimate_of(
    request: GenerationRequest, shape: ModelShape, seen: Sequence[ImageSize]
) -> JsonObject:
    """Tokens by where they come from, and the cost against the same request without extras.

    Args:
        seen: sizes of the reference images as they were given.
    """
    steps = request.sampling.steps
    own = shape.text_tokens + image_tokens(request.rendered_size)
    uses = request.reference_uses or (ReferenceUse(),) * len(seen)
    references: list[JsonObject] = [
        {
            "index": place,
            "role": use.role,
            "tokens": reference_tokens(size, TOKEN_SIDE, use.max_pixels),
            "steps": _active(use.start, use.end, steps),
        }
        for place, (size, use) in enumerate(zip(seen, uses, strict=True))
    ]
    controls: list[JsonObject] = [
        {
            "index": place,
            "id": control.name,
            "steps": _active(control.start, control.end, steps) if control.scale else 0,
        }
        for place, control in enumerate(request.controls)
    ]
    looked = sum(one["tokens"] * one["steps"] for one in references)
    followed = shape.control_share * own * sum(one["steps"] for one in controls)
    plain = own * steps
    return {
        "n": request.n,
        "size": str(request.size),
        "steps": steps,
        "text_tokens": shape.text_tokens,
        "image_tokens": image_tokens(request.rendered_size),
        "references": references,
        "controlnets": controls,
        "token_steps": round(request.n * (plain + looked + followed)),
        "relative_cost": round((plain + looked + followed) / plain, 3),
    }


async def priced(
    gateway: Gateway, model: ImageModel, request: GenerationRequest, estimate: JsonObject
) -> JsonObject:
    """The same with time and price, where jobs of the model were measured."""
    forecast = await gateway.estimates.forecast(model.name)
    work = Work.from_request(request.to_payload())
    seconds = price = None
    if forecast.measured:
        seconds = round(forecast.device_seconds(work) * estimate["relative_cost"], 3)
        price = round(seconds * gateway.settings.gpu_second_price, 6)
    return {
        "object": "image.estimate",
        "model": model.name,
        **estimate,
        "estimated_device_seconds": seconds,
        "estimated_price": price,
    }


def _active(start: float, end: float, steps: int) -> int:
    return sum(acts(start, end, step, steps) for step in range(steps))

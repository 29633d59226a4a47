"""What a client may write in a request body; the names are those of docs/api.md."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
)

from calotype.serving.api.http.body_parts import Body, ControlNet, LoRA, Margins, bounded
from calotype.serving.api.http.foreign_names import hint, value_hint
from calotype.serving.config.model.acceleration import MOST_REUSE
from calotype.serving.core.conditions import MAX_CONTROLS
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import MAX_SEED
from calotype.serving.jobs.events import EventType

B = TypeVar("B", bound=BaseModel)

ALIASES = {"guidance": "guidance_scale", "image_loras": "loras", "scheduler": "sampler"}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60

_Text = Annotated[str, Field(max_length=512)]


_Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], _Text],
    BeforeValidator(lambda given: bounded(given, 16)),
]


class GenerationBody(Body):
    """POST /v1/images/generations, and ``input`` of POST /v1/jobs."""

    prompt: str = Field(description="What the picture shows; up to 32,000 characters.")
    model: str | None = Field(None, description="A model or one of its aliases.")
    n: int = Field(1, ge=1, le=10, description="How many pictures.")
    size: str | None = Field(None, description="WIDTHxHEIGHT, or auto.")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = Field(
        "auto", description="Stands for a number of steps."
    )
    style: Literal["vivid", "natural"] | None = Field(
        None, description="Adds words to the prompt; see revised_prompt in the answer."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None,
        description="Bytes or links. Default: url for dall-e-2 and dall-e-3, else bytes.",
    )
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] = Field(
        "png", description="File format; gif and svg are refused."
    )
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp.")
    background: Literal["auto", "opaque", "transparent"] = Field("auto")
    moderation: Literal["auto", "low"] = Field(
        "auto", description="low: as much less strict as the policy grants."
    )
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="Previews of each picture, streamed.")
    user: _Text | None = None
    safety_identifier: _Text | None = None
    complexity: Literal["low", "medium", "high"] | None = Field(
        None, description="Accepted for OpenAI's clients; says nothing to these models."
    )
    frame_count: int | None = None
    frame_duration_ms: int | None = None
    svg: JsonObject | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Picture i uses seed+i.")
    steps: int | None = Field(None, ge=1, description="Denoise steps; wins over quality.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Distilled guidance.")
    sampler: str | None = Field(None, max_length=64, description="Default: the model's.")
    loras: list[LoRA] = Field(
        default_factory=list, max_length=64, description="Adapters and their strengths."
    )
    width: int | None = Field(None, ge=1, description="With height: wins over size.")
    height: int | None = Field(None, ge=1, description="With width: wins over size.")
    metadata: _Metadata = Field(
        default_factory=dict, max_length=16, description="Comes back with the job."
    )
    priority: Literal["low", "normal", "high"] = Field("normal", description="Inside the team.")
    deadline_seconds: float | None = Field(
        None, gt=0, le=86_400, description="After so long the job fails instead of running."
    )
    negative_prompt: str | None = Field(
        None, max_length=32_000, description="What it shall not show; costs twice the time."
    )
    sigmas: list[float] | None = Field(
        None, max_length=1000, description="Noise levels, falling from at most 1, one a step."
    )
    step_cache: float | None = Field(
        None,
        ge=0,
        le=MOST_REUSE,
        description="Leaves out later blocks of a step where the first one changed by less than "
        "this share: faster, and the picture is only nearly the same. Default: the model's.",
    )
    reference_images: list[Any] | None = Field(
        None,
        max_length=16,
        description="URLs, or {image_url} or {file_id}: pictures to look at. Objects may also hold "
        "role (subject, style, composition), strength, start, end and max_pixels.",
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="How far a picture to start from is changed."
    )
    expand: Margins | None = Field(
        None, description="Of an edit: how far its first image is continued beyond its edges."
    )
    controlnets: list[ControlNet] = Field(
        default_factory=list,
        max_length=MAX_CONTROLS,
        description="Control adapters and the maps that they follow.",
    )
    ip_adapters: list[Any] | None = None
    safety_tolerance: int | None = Field(
        None, ge=0, le=6, description="0 is strictest, 2 the policy; as far as the policy grants."
    )


class EditBody(GenerationBody):
    """POST /v1/images/edits as JSON; in multipart, `image` parts are the images."""

    images: list[Any] = Field(
        default_factory=list, max_length=16, description="{image_url} or {file_id} each."
    )
    mask: Any = Field(None, description="{image_url} or {file_id}; transparent = draw anew.")
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="Accepted for OpenAI's clients; says nothing to these models."
    )
    markup: Any = None


class VariationBody(EditBody):
    """POST /v1/images/variations: an image, no prompt."""

    prompt: str = Field("", max_length=0, description="A variation has none.")


# Parameter -> the feature that it needs.
_NEEDS = {
    "negative_prompt": "negative_prompt",
    "sigmas": "sigmas",
    "reference_images": "references",
    "strength": "variations",
    "expand": "edits",
    "controlnets": "controlnets",
}
_NEVER = (
    "frame_count",
    "frame_duration_ms",
    "svg",
    "markup",
)


class WebhookBody(Body):
    """Whom to tell of one job."""

    url: str = Field(max_length=2048, description="https address.")
    events: list[EventType] = Field(
        default_factory=list,
        max_length=8,
        description="Default: the three ends of a job, and pictures that a person released.",
    )


class JobBody(Body):
    """POST /v1/jobs."""

    type: Literal["image.generate", "image.edit", "image.variation"] = "image.generate"
    model: str | None = None
    input: JsonObject = Field(
        default_factory=dict, description="The parameters of /v1/images/generations."
    )
    recipe: JsonObject | None = Field(
        None, description="A recipe of an earlier picture, instead of its parameters."
    )
    priority: Literal["low", "normal", "high"] = "normal"
    deadline_seconds: float | None = Field(None, gt=0, le=86_400)
    expires_after_seconds: float | None = Field(None, ge=60, le=30 * 86_400)
    metadata: _Metadata = Field(default_factory=dict, max_length=16)
    webhook: WebhookBody | None = None


def parse_generation(
    raw: JsonObject,
    features: Collection[str] = (),
    schema: type[GenerationBody] = GenerationBody,
    *,
    form: bool = False,
) -> GenerationBody:
    """Reads the parameters of a generation, an edit or a variation.

    Args:
        features: what the workers can do (`settings.FEATURES`).
        form: see `parse`.

    Raises:
        InvalidRequest: the first fault, with the parameter's name and what would be right.
    """
    if issubclass(schema, EditBody) and not form:
        raw = _with_images(raw)
    refused = [name for name in (*_NEEDS, *_NEVER) if _NEEDS.get(name) not in features]
    body = parse(schema, _without_aliases(raw), form=form, refused=refused)
    for name in refused:
        if getattr(body, name, None):
            raise InvalidRequest(
                f"{name} is not supported by this service yet; leave it out.",
                code="unsupported_value",
                param=name,
            )
    if body.ip_adapters:
        raise InvalidRequest(
            "ip_adapters are not supported: FLUX.2 looks at pictures by itself. Give the picture "
            "in reference_images, with role 'subject', 'style' or 'composition' and a strength.",
            code="unsupported_value",
            param="ip_adapters",
        )
    if body.output_format in ("gif", "svg"):
        raise InvalidRequest(
            f"output_format {body.output_format!r} is not supported; use png, jpeg or webp.",
            code="unsupported_value",
            param="output_format",
        )
    if body.background == "transparent":
        raise InvalidRequest(
            "background 'transparent' is not supported by this model; use 'opaque' or 'auto'.",
            code="unsupported_value",
            param="background",
        )
    if body.moderation == "low" and body.safety_tolerance is not None:
        raise InvalidRequest(
            "moderation 'low' and safety_tolerance ask for the same; give one of them.",
            param="safety_tolerance",
        )
    if body.partial_images and not body.stream:
        raise InvalidRequest(
            "partial_images is for streams; set stream to true, or leave it out.",
            param="partial_images",
        )
    if (body.width is None) != (body.height is None):
        missing = "width" if body.width is None else "height"
        raise InvalidRequest(
            "width and height belong together; give both, or size.",
            code="missing_required_parameter",
            param=missing,
        )
    return body


def parse(
    schema: type[B], raw: JsonObject, *, form: bool = False, refused: Collection[str] = ()
) -> B:
    """``raw`` as ``schema``; null means "not given", as in OpenAI's API.

    Args:
        form: of a form, where numbers and booleans are strings: pydantic's lax mode reads them.
        refused: fields that are refused by name later, and advised to nobody.

    Raises:
        InvalidRequest: see `parse_generation`.
    """
    given = {name: value for name, value in raw.items() if value is not None}
    try:
        return schema.model_validate(given, strict=False if form else None)
    except ValidationError as error:
        raise _refusal(schema, error, refused) from None


def _with_images(raw: JsonObject) -> JsonObject:
    """``image``, one or several, as JSON bodies of other systems write ``images``."""
    if raw.get("image") is None:
        return raw
    if raw.get("images") is not None:
        raise InvalidRequest("image and images mean the same; give one of them.", param="image")
    given = raw["image"]
    rest = {name: value for name, value in raw.items() if name != "image"}
    return rest | {"images": given if isinstance(given, list) else [given]}


def _without_aliases(raw: JsonObject) -> JsonObject:
    plain: JsonObject = {}
    for name, value in raw.items():
        target = ALIASES.get(name, name)
        if target in plain and plain[target] is not None and value is not None:
            raise InvalidRequest(
                f"{name} and {target} mean the same; give one of them.", param=name
            )
        if value is not None:
            plain[target] = value
    loras = plain.get("loras")
    if isinstance(loras, list):
        plain["loras"] = [_with_id(item) for item in loras]
    return plain


def _with_id(item: Any) -> Any:
    """Together's clients call an adapter's name ``path``."""
    if isinstance(item, dict) and "path" in item and "id" not in item:
        return {"id": item["path"]} | {k: v for k, v in item.items() if k != "path"}
    return item


def _refusal(
    schema: type[BaseModel], error: ValidationError, refused: Collection[str]
) -> InvalidRequest:
    # A misspelt name is the cause of a missing one, so it is named first.
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    param = _path(fault["loc"])
    kind = fault["type"]
    if kind == "extra_forbidden":
        advice = ""
        if len(fault["loc"]) == 1:
            advice = _advice(schema, str(fault["loc"][0]), refused)
        return InvalidRequest(
            f"Unknown parameter: '{param}'.{advice}", code="unknown_parameter", param=param
        )
    if kind == "missing":
        return InvalidRequest(
            f"Missing required parameter: '{param}'.",
            code="missing_required_parameter",
            param=param,
        )
    wrong_type = kind.endswith(("_type", "_parsing")) or kind == "int_from_float"
    shown = _SHORT.repr(fault["input"])  # not all of a long list is put into words
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    where = f"'{param}'" if param else "the body"
    return InvalidRequest(
        f"Invalid {'type' if wrong_type else 'value'} for {where}: "
        f"{fault['msg'][0].lower()}{fault['msg'][1:]}; got {shown}.{value_hint(fault['input'])}",
        code="invalid_type" if wrong_type else "invalid_value",
        param=param,
    )


def _advice(schema: type[BaseModel], name: str, refused: Collection[str]) -> str:
    if "input" in schema.model_fields and name in GenerationBody.model_fields:
        return " It belongs into 'input'."
    return hint(name, [field for field in (*schema.model_fields, *ALIASES) if field not in refused])


def _path(location: tuple[int | str, ...]) -> str:
    """``("loras", 0, "scale")`` -> ``loras[0].scale``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:120]

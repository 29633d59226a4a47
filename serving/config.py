"""What a manifest may say, and the settings of a running service.

The custom resources of calotype are its configuration format everywhere: the operator reads them
from the Kubernetes API, ``calotype serve -f`` reads the same files from disk. Nothing here loads a
model, opens a database or knows Kubernetes.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.alias_generators import to_camel

from calotype.serving.errors import InvalidRequest
from calotype.serving.request import ImageSize

API_VERSION: Literal["calotype.dev/v1alpha1"] = "calotype.dev/v1alpha1"
PATCH = 16
"""Width and height of a picture are multiples of this: 8x by the VAE, 2x by the patching."""

Name = Annotated[
    str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", description="Kubernetes name")
]


class Spec(BaseModel):
    """Base of everything inside a manifest: camelCase on the wire, no unknown fields."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True
    )


class HuggingFaceSource(Spec):
    repo: str = Field(description="Repository, for example black-forest-labs/FLUX.2-dev.")
    revision: str = Field("main", description="Branch, tag or commit.")


class BuiltInSource(Spec):
    name: str = Field(description="Name of weights that are part of the package.")


class Source(Spec):
    """Where weights come from; exactly one field."""

    built_in: BuiltInSource | None = Field(None, description="Weights inside the package.")
    path: str | None = Field(
        None, description="A folder (model) or file (adapter); relative to the manifest."
    )
    hugging_face: HuggingFaceSource | None = Field(None, description="A Hugging Face repository.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "name exactly one of builtIn, path, huggingFace"
                + (f"; got {' and '.join(to_camel(g) for g in given)}" if given else "; got none")
            )
        return self


class Replicas(Spec):
    min: int = Field(1, ge=0, le=1000, description="Replicas that always run.")
    max: int = Field(1, ge=1, le=1000, description="Replicas at most.")

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"replicas.min ({self.min}) must not exceed replicas.max ({self.max})")
        return self


class Autoscaling(Spec):
    target_queue_seconds: float = Field(
        20, gt=0, description="Replicas are added until the predicted wait is shorter than this."
    )
    upscale_delay_seconds: float = Field(10, ge=0, description="How long a need must last.")
    downscale_delay_seconds: float = Field(900, ge=0, description="How long a replica may idle.")


class Defaults(Spec):
    """What a request gets that does not say."""

    steps: int = Field(28, ge=1, le=1000, description="Denoise steps.")
    guidance_scale: float = Field(4.0, ge=0, le=100, description="Distilled guidance.")
    sampler: Literal["flow-euler"] = Field("flow-euler", description="Sampler.")
    size: str = Field("1024x1024", description="WIDTHxHEIGHT in pixels.")

    @field_validator("size")
    @classmethod
    def _parses(cls, value: str) -> str:
        try:
            ImageSize.parse(value)
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        return value


class Preset(Spec):
    """What `quality` stands for."""

    steps: int = Field(ge=1, le=1000, description="Denoise steps.")


class Limits(Spec):
    """What is refused with 400 before it costs anything."""

    min_side: int = Field(64, ge=PATCH, description="Smallest width or height in pixels.")
    max_pixels: int = Field(4_194_304, ge=4096, description="Largest width x height.")
    max_steps: int = Field(50, ge=1, le=1000, description="Most denoise steps.")
    max_images: int = Field(10, ge=1, le=10, description="Most pictures of one request.")
    max_prompt_chars: int = Field(32_000, ge=1, description="Longest prompt, in characters.")
    max_adapters: int = Field(4, ge=0, le=16, description="Most LoRA adapters of one request.")


class Enlarge(Spec):
    """Pictures larger than the model can draw are drawn at its native scale and enlarged."""

    above_side: int = Field(224, description="Sizes with a longer side are enlarged.")
    native_short_side: int = Field(128, description="Short side of what is drawn then, in pixels.")


class AdapterPolicy(Spec):
    max_rank: int = Field(64, ge=1, le=1024, description="Highest LoRA rank that is loaded.")


class ImageModelSpec(Spec):
    """A servable model."""

    source: Source = Field(description="Where the diffusers-format folder comes from.")
    precision: Literal["float32", "bfloat16", "int8"] = Field(
        "bfloat16", description="Number format of the denoiser."
    )
    replicas: Replicas = Field(default_factory=Replicas, description="Generator replicas.")
    autoscaling: Autoscaling = Field(default_factory=Autoscaling, description="When to scale.")
    defaults: Defaults = Field(default_factory=Defaults, description="Request defaults.")
    quality_presets: dict[Literal["low", "medium", "high"], Preset] = Field(
        default_factory=dict, description="Steps per quality; missing ones use the default."
    )
    limits: Limits = Field(default_factory=Limits, description="What is refused.")
    enlarge: Enlarge | None = Field(None, description="Enlarging of large sizes; null = refuse.")
    adapters: AdapterPolicy = Field(default_factory=AdapterPolicy, description="LoRA limits.")
    aliases: list[str] = Field(
        default_factory=list, description="Other names in `model=`, such as dall-e-3."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the denoiser runs.")

    def check_size(self, size: ImageSize, param: str = "size") -> ImageSize:
        """The size that the denoiser draws for ``size``.

        Raises:
            InvalidRequest: no multiple of 16, too small or too large; says what would be right.
        """
        limits = self.limits
        for side in (size.width, size.height):
            if side < limits.min_side:
                raise InvalidRequest(
                    f"{param} {size} is too small: each side must be at least "
                    f"{limits.min_side} pixels.",
                    param=param,
                )
        if size.pixels > limits.max_pixels or max(size.width, size.height) > 16 * min(
            size.width, size.height
        ):
            raise InvalidRequest(
                f"{param} {size} is too large: width x height may be at most "
                f"{limits.max_pixels:,} pixels, and the long side at most 16 times the short one.",
                code="resolution_too_large" if size.pixels > limits.max_pixels else None,
                param=param,
            )
        if size.width % PATCH or size.height % PATCH:
            near = ImageSize(
                *(max(PATCH, round(s / PATCH) * PATCH) for s in (size.width, size.height))
            )
            raise InvalidRequest(
                f"{param} {size} is not possible: width and height must be multiples of {PATCH}; "
                f"the nearest is {near}.",
                param=param,
            )
        if self.enlarge is None or max(size.width, size.height) <= self.enlarge.above_side:
            return size
        scale = min(1.0, self.enlarge.native_short_side / min(size.width, size.height))
        return ImageSize(
            *(max(PATCH, round(s * scale / PATCH) * PATCH) for s in (size.width, size.height))
        )


class Scale(Spec):
    default: float = Field(1.0, description="Scale where a request names none.")
    min: float = Field(0.0, description="Smallest scale of a request.")
    max: float = Field(1.5, description="Largest scale of a request.")


class ModelRef(Spec):
    name: Name = Field(description="Name of an ImageModel.")


class LoRAAdapterSpec(Spec):
    """A LoRA adapter of one model."""

    model_ref: ModelRef = Field(description="The model it was trained on.")
    source: Source = Field(description="Where the safetensors file comes from.")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="The file must have this digest."
    )
    scale: Scale = Field(default_factory=Scale, description="Allowed scales.")
    trigger_words: list[str] = Field(default_factory=list, description="Words that evoke it.")


class Metadata(BaseModel):
    """The part of Kubernetes' ObjectMeta that is read from files; the rest is kept unread."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Name
    namespace: str = "default"


class Resource(BaseModel):
    """Base of the kinds."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)

    api_version: Literal["calotype.dev/v1alpha1"] = Field(API_VERSION, alias="apiVersion")
    metadata: Metadata

    @property
    def name(self) -> str:
        return self.metadata.name


class ImageModel(Resource):
    kind: Literal["ImageModel"] = "ImageModel"
    spec: ImageModelSpec


class LoRAAdapter(Resource):
    kind: Literal["LoRAAdapter"] = "LoRAAdapter"
    spec: LoRAAdapterSpec


class Manifests(BaseModel):
    """Everything that a set of files declares."""

    models: list[ImageModel] = []
    adapters: list[LoRAAdapter] = []
    policies: dict[str, dict[str, Any]] = {}
    """ModerationPolicy name -> its spec; `moderation.policy` reads it."""


class ManifestError(InvalidRequest):
    """A manifest file cannot be used; the message names file, document and field."""


def load_manifests(paths: Sequence[pathlib.Path]) -> Manifests:
    """Reads YAML files, and every ``*.yaml`` and ``*.yml`` of folders.

    Relative ``source.path`` entries are resolved against the file that holds them.

    Raises:
        ManifestError: a file is missing, is no YAML or says something that no resource has.
    """
    found = Manifests(models=[], adapters=[], policies={})
    for file in _files(paths):
        try:
            documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ManifestError(f"{file}: not valid YAML: {error}") from None
        for number, document in enumerate(documents, start=1):
            if document is not None:
                _add(found, document, file, f"{file}, document {number}")
    names = {model.name for model in found.models}
    for adapter in found.adapters:
        if found.models and adapter.spec.model_ref.name not in names:
            raise ManifestError(
                f"LoRAAdapter {adapter.name}: spec.modelRef.name is "
                f"{adapter.spec.model_ref.name!r}, but the models given are {sorted(names)}."
            )
    return found


def _files(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    files: list[pathlib.Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        elif path.is_file():
            files.append(path)
        else:
            raise ManifestError(f"{path}: no such file or folder.")
    return files


def _add(found: Manifests, document: Any, file: pathlib.Path, where: str) -> None:
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: a resource is a mapping with apiVersion and kind.")
    kind = document.get("kind")
    if document.get("apiVersion") != API_VERSION:
        raise ManifestError(
            f"{where}: apiVersion must be {API_VERSION!r}, got {document.get('apiVersion')!r}."
        )
    try:
        if kind == "ImageModel":
            found.models.append(_resolved(ImageModel.model_validate(document), file))
        elif kind == "LoRAAdapter":
            found.adapters.append(_resolved(LoRAAdapter.model_validate(document), file))
        elif kind == "ModerationPolicy":
            name = Metadata.model_validate(document.get("metadata") or {}).name
            found.policies[name] = dict(document.get("spec") or {})
        else:
            raise ManifestError(
                f"{where}: kind must be ImageModel, LoRAAdapter or ModerationPolicy, got {kind!r}."
            )
    except ValidationError as error:
        raise ManifestError(f"{where} ({kind}): {describe(error)}") from None


def _resolved(resource: Any, file: pathlib.Path) -> Any:
    source: Source = resource.spec.source
    if source.path is None:
        return resource
    absolute = (file.parent / pathlib.Path(source.path).expanduser()).resolve()
    source = source.model_copy(update={"path": str(absolute)})
    return resource.model_copy(update={"spec": resource.spec.model_copy(update={"source": source})})


def describe(error: ValidationError) -> str:
    """One sentence for a pydantic error: the field and what is wrong with it, first fault first."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "the document"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{field} is not a field; remove it or correct its spelling{more}."
    return f"{field}: {first['msg'].removeprefix('Value error, ')}{more}."


BUILT_IN_MODEL = ImageModel(
    metadata=Metadata(name="shapes"),
    spec=ImageModelSpec(
        source=Source(built_in=BuiltInSource(name="shapes")),
        precision="float32",
        defaults=Defaults(steps=20, guidance_scale=2.5, size="128x128"),
        quality_presets={
            "low": Preset(steps=10),
            "medium": Preset(steps=20),
            "high": Preset(steps=30),
        },
        enlarge=Enlarge(),
        aliases=[
            "dall-e-2",
            "dall-e-3",
            "gpt-image-1",
            "gpt-image-1-mini",
            "gpt-image-1.5",
            "gpt-image-2",
        ],
    ),
)
"""What `calotype serve` serves when no manifest names a model."""

BUILT_IN_ADAPTER = LoRAAdapter(
    metadata=Metadata(name="stripes"),
    spec=LoRAAdapterSpec(
        model_ref=ModelRef(name="shapes"),
        source=Source(built_in=BuiltInSource(name="stripes")),
        trigger_words=["striped"],
    ),
)
"""The example adapter, served beside the built-in model."""


def with_defaults(found: Manifests) -> Manifests:
    """What was found; without any model the built-in one, with its example adapter."""
    if found.models:
        return found
    return found.model_copy(
        update={"models": [BUILT_IN_MODEL], "adapters": [*found.adapters, BUILT_IN_ADAPTER]}
    )


def local_model(name: str) -> ImageModel:
    """The model that a command line names: the built-in one, or a folder of FLUX.2 weights."""
    if name == BUILT_IN_MODEL.name:
        return BUILT_IN_MODEL
    folder = pathlib.Path(name).expanduser().resolve()
    spec = ImageModelSpec(source=Source(path=str(folder)))
    return ImageModel(metadata=Metadata(name="local"), spec=spec)

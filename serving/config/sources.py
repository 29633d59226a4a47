"""Where weights and data come from; always exactly one place."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from calotype.serving.config.base import VALIDATIONS, Matches, Name, Rule, Sha256, Spec, no_way_up

CREDENTIAL_KEYS: dict[str, tuple[str, ...]] = {
    "huggingFace": ("HF_TOKEN",),
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "http": ("HTTP_AUTHORIZATION",),
    "provider": ("API_KEY",),
}
"""Kind of source -> the keys that its Secret must have; the other sources need none."""

CREDENTIALS = (
    "Secret of this namespace with the keys that the source needs: HF_TOKEN for huggingFace, "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3, HTTP_AUTHORIZATION (the whole header) "
    "for http, API_KEY for provider. Default: none, the source is public."
)

_RELATIVE = Matches(
    r"[^/\x00-\x1f][^\x00-\x1f]*",
    "a path inside the volume does not begin with '/', for example 'loras/sneaker.safetensors'",
)
Repository = Annotated[
    str,
    Field(min_length=1, max_length=200),
    Matches(
        r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*",
        "a repository is OWNER/NAME, for example 'black-forest-labs/FLUX.2-dev'",
    ),
]
S3Uri = Annotated[
    str,
    Field(min_length=6, max_length=1024),
    Matches(
        r"s3://[a-z0-9][a-z0-9.-]+(/[^\x00-\x1f]*)?",
        "an S3 address is s3://BUCKET/KEY, for example 's3://models/flux-2-dev/'",
    ),
]
HttpUrl = Annotated[
    str,
    Field(min_length=8, max_length=2048),
    Matches(
        r"https?://[A-Za-z0-9\[][^\s\x00-\x1f]*",
        "an address begins with https:// or http:// and has no spaces",
    ),
]


class HuggingFaceSource(Spec):
    """A repository of the Hugging Face hub."""

    repo: Repository = Field(description="Repository, for example black-forest-labs/FLUX.2-dev.")
    revision: str = Field(
        "main",
        min_length=1,
        max_length=200,
        description="Branch, tag or commit; resolved once to a commit, which every replica gets.",
    )
    filename: str | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="The safetensors file of an adapter inside the repository. Default: the only "
        "one that is there. A model is the whole repository, so leave it out.",
    )


class S3Source(Spec):
    """An object, or all objects under a prefix, in S3 or a store that speaks its protocol."""

    uri: S3Uri = Field(description="s3://BUCKET/KEY; a prefix that ends with '/' is a folder.")
    endpoint: HttpUrl | None = Field(
        None, description="Address of a store that is not AWS, such as MinIO. Default: AWS."
    )
    region: str | None = Field(
        None, min_length=1, max_length=63, description="Region of the bucket. Default: the store's."
    )


class HttpSource(Spec):
    """One file from a web server."""

    url: HttpUrl = Field(
        description="Address of a safetensors file, or of a tar archive of a model's folder."
    )
    sha256: Sha256 | None = Field(
        None, description="The download must have this digest. Default: any is taken and reported."
    )


class VolumeSource(Spec):
    """A file or folder on a PersistentVolumeClaim of the same namespace."""

    rules = (no_way_up("path"),)

    claim_name: Name = Field(description="Name of the PersistentVolumeClaim.")
    path: Annotated[str, _RELATIVE] = Field(
        ".",
        min_length=1,
        max_length=1024,
        description="Path inside the volume. Default: the root of the volume.",
    )


class BuiltInSource(Spec):
    """Weights that are part of the package."""

    name: Name = Field(
        description="shapes (a model), stripes (a LoRA), layout (a control adapter)."
    )


class ProviderSource(Spec):
    """Another company's service, called instead of a GPU of ours."""

    name: Literal["openai", "bfl", "replicate", "fal", "together"] = Field(
        description="Whose service."
    )
    model: str = Field(
        min_length=1, max_length=200, description="Name of the model there, word for word."
    )


class OneOf(Spec):
    """An object of which exactly one field is given."""

    @model_validator(mode="after")
    def _exactly_one(self) -> OneOf:
        fields = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(fields) != 1:
            got = " and ".join(to_camel(name) for name in fields) or "none"
            raise ValueError(f"{self._message()}; got {got}")
        return self

    @classmethod
    def _message(cls) -> str:
        return f"name exactly one of {', '.join(to_camel(name) for name in cls.model_fields)}"

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        found = super().__get_pydantic_json_schema__(schema, handler)
        given = ", ".join(f"has(self.{to_camel(name)})" for name in cls.model_fields)
        handler.resolve_ref_schema(found).setdefault(VALIDATIONS, []).append(
            {"rule": f"[{given}].filter(given, given).size() == 1", "message": cls._message()}
        )
        return found


class Source(OneOf):
    """Where weights come from; exactly one field."""

    rules = (no_way_up("path"),)

    built_in: BuiltInSource | None = Field(None, description="Weights inside the package.")
    path: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="A folder (model) or a safetensors file (adapter). On a laptop, relative to "
        "the manifest; in a cluster, an absolute path inside the model's pods, for an adapter in "
        "one of the folders that an administrator allows.",
    )
    hugging_face: HuggingFaceSource | None = Field(None, description="A Hugging Face repository.")
    s3: S3Source | None = Field(None, description="An S3 bucket.")
    http: HttpSource | None = Field(None, description="A web server.")
    persistent_volume_claim: VolumeSource | None = Field(
        None, description="A volume that is already filled."
    )


class MergedModel(Spec):
    """One of the models that a model is merged from."""

    rules = (
        Rule(
            lambda s: s.source.persistent_volume_claim is None,
            "!has(self.source.persistentVolumeClaim)",
            "an input of a merge cannot be on a volume of its own: name a path that the model's "
            "pods see, or one of huggingFace, s3, http, builtIn",
            ".source.persistentVolumeClaim",
        ),
    )

    source: Source = Field(
        description="Where its diffusers-format folder comes from; exactly one field."
    )
    weight: float = Field(1.0, ge=-10, le=10, description="Its share.")
    licence: str = Field(
        min_length=1,
        max_length=200,
        description="Licence of its weights, for example apache-2.0 or "
        "flux-dev-non-commercial-license.",
    )


class MergeSource(Spec):
    """Models of one base, merged into a new one when the weights are fetched."""

    rules = (
        Rule(
            lambda s: (s.method in ("task", "ties", "dare")) == (s.base is not None),
            "(self.method in ['task', 'ties', 'dare']) == has(self.base)",
            "task, ties and dare add differences from a base, and the others know none: name "
            "source.merge.base for these methods only",
            ".base",
        ),
        Rule(
            lambda s: len(s.inputs) > 1 or s.base is not None,
            "self.inputs.size() > 1 || has(self.base)",
            "a merge needs two inputs, or one and a base",
            ".inputs",
        ),
    )

    method: Literal["linear", "slerp", "task", "ties", "dare"] = Field(
        description="linear: weighted mean. slerp: two models, along a great circle. task: base "
        "plus weighted differences. ties: of each difference the largest values, of these the "
        "sign of the majority. dare: of each difference a share by lot."
    )
    inputs: list[MergedModel] = Field(
        min_length=1, max_length=8, description="What is merged; the first gives all other parts."
    )
    base: MergedModel | None = Field(
        None, description="What differences are from: for task, ties and dare."
    )
    density: float = Field(
        0.5, gt=0, le=1, description="Share of each difference that ties and dare keep."
    )
    seed: int = Field(0, ge=0, le=2**53, description="Of the lots of dare.")
    commercial: bool = Field(
        False, description="true: refuse a merge whose licence forbids commercial use."
    )
    licence: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Licence of the result, where the owners agreed to one. Default: it follows "
        "from the inputs'.",
    )

    @property
    def models(self) -> tuple[MergedModel, ...]:
        """All of them, the base last."""
        return (*self.inputs, *(() if self.base is None else (self.base,)))


class ModelSource(Source):
    """Where the weights of a model come from, or who draws instead; exactly one field."""

    provider: ProviderSource | None = Field(
        None,
        description="Another company's service draws; no GPU, no cluster and no weights are "
        "needed. Its API key is in the Secret of credentialsSecretRef.",
    )
    merge: MergeSource | None = Field(
        None,
        description="Merged from other models when it is fetched; the recipe, their digests and "
        "the licence are kept with it.",
    )


def credential_keys(source: Source) -> tuple[str, ...]:
    """Keys that the Secret of a source must have; of a merge those of all its models."""
    merge = source.merge if isinstance(source, ModelSource) else None
    if merge is None:
        kind = next(iter(source.model_dump(by_alias=True, exclude_none=True)))
        return CREDENTIAL_KEYS.get(kind, ())
    return tuple(dict.fromkeys(k for one in merge.models for k in credential_keys(one.source)))

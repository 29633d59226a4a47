"""ImageModel: a servable model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from calotype.serving.config.base import (
    LABEL,
    Matches,
    ModelRef,
    PolicyRef,
    ProfileName,
    Resource,
    Rule,
    SecretRef,
    Spec,
    StatusModel,
    Transition,
    Unique,
    name_rule,
)
from calotype.serving.config.conditions import Retried, Status
from calotype.serving.config.model.acceleration import Acceleration
from calotype.serving.config.model.cache import Cache
from calotype.serving.config.model.sampling import PATCH, Defaults, Enlarge, Limits, Preset
from calotype.serving.config.model.scaling import Autoscaling, Replicas, TextEncoder
from calotype.serving.config.namespaces import AdapterNamespaces
from calotype.serving.config.quantity import Quantity
from calotype.serving.config.sources import CREDENTIALS, ModelSource, Source
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import ImageSize

LONGEST_NAME = 40
"""KubeRay adds up to 23 characters to the name of a RayService, of 63 that a label may have."""
ALIAS_RULE = Matches(
    r"[A-Za-z0-9]([A-Za-z0-9._:/@-]*[A-Za-z0-9])?",
    "an alias has letters, digits and . _ : / @ -, for example 'gpt-image-1' or 'acme/flux'",
)


class Licence(Spec):
    """The licence of the weights."""

    rules = (
        Rule(
            lambda s: s.accepted,
            "self.accepted",
            "the model is not served before its licence is accepted: read it and set "
            "accepted: true",
        ),
    )

    name: str = Field(
        min_length=1,
        max_length=200,
        description="Name, for example flux-dev-non-commercial-license.",
    )
    accepted: bool = Field(description="true: whoever applies this has read and accepted it.")


class AdapterPolicy(Spec):
    """Which LoRA adapters a model takes."""

    max_rank: int = Field(
        256,
        ge=1,
        le=1024,
        description="Highest LoRA rank that is loaded; of LoKr and LoHa the rank as a LoRA.",
    )
    memory_budget: Quantity = Field(
        "8Gi",
        description="Device memory of all loaded adapters of one replica together, in bytes. An "
        "adapter that is larger is refused; when it is full, those that are not used go.",
    )
    host_memory_budget: Quantity = Field(
        "16Gi",
        description="Memory of one replica's host for the adapters that left the device, in bytes; "
        "when it is full, those that were not used for longest are read from disk again.",
    )
    namespaces: AdapterNamespaces = Field(
        default_factory=AdapterNamespaces, description="From where adapters are taken."
    )
    trainings_yield: bool = Field(
        True,
        description="Trainings that share the model's device with it pause while its pictures are "
        "asked for. Only `calotype serve` shares one; a LoRATraining has pods of its own.",
    )


class FallbackCondition(Spec):
    """When the other model draws."""

    queue_seconds_above: float = Field(
        60, ge=0, le=86_400, description="Predicted wait, in seconds, above which it does."
    )


class Fallback(Spec):
    """Another model that takes requests when this one cannot."""

    model_ref: ModelRef = Field(description="The model that draws instead.")
    when: FallbackCondition = Field(
        default_factory=FallbackCondition, description="When, beside not being ready at all."
    )


class ImageModelSpec(Spec):
    """A servable model."""

    rules = (
        Rule(
            lambda s: s.defaults.steps <= s.limits.max_steps,
            "self.defaults.steps <= self.limits.maxSteps",
            "defaults.steps must not exceed limits.maxSteps: lower the default or raise the limit",
            ".defaults.steps",
        ),
        Rule(
            lambda s: all(p.steps <= s.limits.max_steps for p in s.quality_presets.values()),
            "self.qualityPresets.all(name, self.qualityPresets[name].steps <= "
            "self.limits.maxSteps)",
            "the steps of a quality preset must not exceed limits.maxSteps: lower the preset or "
            "raise the limit",
            ".qualityPresets",
        ),
        Rule(
            lambda s: ImageSize.parse(s.defaults.size).pixels <= s.limits.max_pixels,
            "!self.defaults.size.matches('^[0-9]{2,4}x[0-9]{2,4}$') || "
            "int(self.defaults.size.split('x')[0]) * int(self.defaults.size.split('x')[1]) "
            "<= self.limits.maxPixels",
            "defaults.size has more pixels than limits.maxPixels allows: choose a smaller size or "
            "raise the limit",
            ".defaults.size",
        ),
        Rule(
            lambda s: min(_sides(s.defaults.size)) >= s.limits.min_side,
            "!self.defaults.size.matches('^[0-9]{2,4}x[0-9]{2,4}$') || "
            "self.defaults.size.split('x').all(side, int(side) >= self.limits.minSide)",
            "defaults.size is smaller than limits.minSide allows: choose a larger size or lower "
            "the limit",
            ".defaults.size",
        ),
        Rule(
            lambda s: s.source.provider is None or s.credentials_secret_ref is not None,
            "!has(self.source.provider) || has(self.credentialsSecretRef)",
            "a provider wants an API key: put it into a Secret under the key API_KEY and name the "
            "Secret in credentialsSecretRef",
            ".credentialsSecretRef",
        ),
        Rule(
            lambda s: s.source.hugging_face is None or s.source.hugging_face.filename is None,
            "!has(self.source.huggingFace) || !has(self.source.huggingFace.filename)",
            "a model is a whole repository: remove source.huggingFace.filename",
            ".source.huggingFace.filename",
        ),
        Rule(
            lambda s: s.autoscaling.scale_to_zero_after_seconds is None or s.replicas.min == 0,
            "!has(self.autoscaling.scaleToZeroAfterSeconds) || self.replicas.min == 0",
            "autoscaling.scaleToZeroAfterSeconds has an effect only where replicas.min is 0: set "
            "replicas.min to 0 or remove scaleToZeroAfterSeconds",
            ".autoscaling.scaleToZeroAfterSeconds",
        ),
    )
    transitions = (
        Transition(
            "has(self.source.provider) == has(oldSelf.source.provider)",
            "a model with weights and a model of a provider cannot become each other: create "
            "another ImageModel and move the aliases to it",
            ".source",
        ),
        Transition(
            "self.runtime == oldSelf.runtime",
            "runtime cannot be changed: create another ImageModel and move the aliases to it",
            ".runtime",
        ),
    )

    source: ModelSource = Field(
        description="Where the diffusers-format folder comes from; exactly one field."
    )
    credentials_secret_ref: SecretRef | None = Field(None, description=CREDENTIALS)
    licence: Licence | None = Field(
        None, description="Licence of the weights. Default: none that needs to be accepted."
    )
    precision: Literal["float32", "bfloat16", "int8"] = Field(
        "bfloat16", description="Number format of the denoiser; int8 halves its size."
    )
    acceleration: Acceleration = Field(
        default_factory=Acceleration, description="What draws faster, and what that costs."
    )
    resource_profile: ProfileName = Field(
        "default",
        description="Profile of the chart's resourceProfiles for one replica: GPUs, requests, "
        "node selector, tolerations.",
    )
    runtime: Literal["RayService", "SinglePod"] = Field(
        "RayService",
        description="RayService: a Ray cluster of its own, by KubeRay. SinglePod: Ray inside one "
        "pod, for small models and clusters without KubeRay. It cannot be changed later.",
    )
    replicas: Replicas = Field(default_factory=Replicas, description="Generator replicas.")
    text_encoder: TextEncoder | None = Field(
        None,
        description="GPUs of the text encoder's own. Default: one replica beside the generators.",
    )
    autoscaling: Autoscaling = Field(default_factory=Autoscaling, description="When to scale.")
    defaults: Defaults = Field(default_factory=Defaults, description="Request defaults.")
    quality_presets: dict[Literal["low", "medium", "high"], Preset] = Field(
        default_factory=dict, description="Steps per quality; missing ones use the default."
    )
    limits: Limits = Field(default_factory=Limits, description="What is refused.")
    enlarge: Enlarge | None = Field(
        None,
        description="Sizes beyond the model's reach are drawn small and enlarged. Default: every "
        "size is drawn as it is.",
    )
    adapters: AdapterPolicy = Field(default_factory=AdapterPolicy, description="LoRA limits.")
    moderation_policy_ref: PolicyRef | None = Field(
        None,
        description="ModerationPolicy of this namespace. Default: the one named default, else the "
        "one of the package. The safety stage cannot be switched off.",
    )
    aliases: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=253), ALIAS_RULE]], Unique()
    ] = Field(
        default_factory=list,
        max_length=32,
        description="Other names in `model=`, such as dall-e-3.",
    )
    cache: Cache | None = Field(
        None, description="Where fetched weights are kept. Default: the volume of the release."
    )
    upgrade_strategy: Literal["NewCluster", "Incremental", "InPlaceOnly"] = Field(
        "NewCluster",
        description="What follows a change that running pods cannot take. NewCluster: a second "
        "Ray cluster is made ready, then takes over (twice the GPUs for a while). Incremental: "
        "it takes over by and by. InPlaceOnly: nothing, until the model is suspended.",
    )
    fallback: Fallback | None = Field(
        None, description="Model that draws when this one cannot. Default: requests wait."
    )
    suspend: bool = Field(False, description="true: no pods, no GPUs; requests are kept and wait.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the denoiser runs.")

    @field_validator("source", mode="before")
    @classmethod
    def _without_provider(cls, given: Any) -> Any:
        """A source that adapters have too is one of models."""
        if isinstance(given, Source) and not isinstance(given, ModelSource):
            return given.model_dump()
        return given

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
        return self.rendered_size(size)

    def rendered_size(self, size: ImageSize) -> ImageSize:
        """What the denoiser draws for ``size``: whole patches of the nearest proportions, smaller
        where the model enlarges."""
        scale = 1.0
        if self.enlarge is not None and max(size.width, size.height) > self.enlarge.above_side:
            scale = min(1.0, self.enlarge.native_short_side / min(size.width, size.height))
        return ImageSize(
            *(max(PATCH, round(s * scale / PATCH) * PATCH) for s in (size.width, size.height))
        )


def _sides(size: str) -> tuple[int, int]:
    parsed = ImageSize.parse(size)
    return parsed.width, parsed.height


class ModelReplicas(StatusModel):
    """Generator replicas of the running service."""

    ready: int = Field(0, ge=0, description="Replicas that draw.")
    desired: int = Field(0, ge=0, description="Replicas that the autoscaler wants now.")
    max: int = Field(0, ge=0, description="Replicas at most.")


class LoadedAdapters(StatusModel):
    """LoRA adapters of the running service."""

    loaded: int = Field(0, ge=0, description="Adapters that every ready replica has.")
    desired: int = Field(0, ge=0, description="Adapters that are accepted for this model.")


class ImageModelStatus(Status):
    """What the operator knows about a model."""

    phase: (
        Literal[
            "Pending",
            "Fetching",
            "Starting",
            "Ready",
            "Degraded",
            "Suspended",
            "Failed",
            "Terminating",
        ]
        | None
    ) = Field(None, description="Where the model is in its life, in one word.")
    url: str | None = Field(
        None, max_length=2048, description="Address of the model app inside the cluster."
    )
    replicas: ModelReplicas | None = Field(None, description="Generator replicas.")
    serving: str | None = Field(
        None, max_length=32, description="replicas.ready/replicas.desired, for `kubectl get`."
    )
    selector: str | None = Field(
        None, max_length=1024, description="Label selector of the pods, for `kubectl scale`."
    )
    adapters: LoadedAdapters | None = Field(None, description="LoRA adapters.")
    resolved_revision: str | None = Field(
        None, max_length=1024, description="The commit, version or digest that is served."
    )
    weights_sha256: str | None = Field(
        None, max_length=64, description="Digest of the served weights, over all files."
    )
    weights_path: str | None = Field(
        None, max_length=4096, description="The served folder inside the model's pods."
    )
    weights_bytes: int | None = Field(
        None, ge=0, description="Size of the served weights, in bytes."
    )
    source_hash: str | None = Field(
        None,
        max_length=64,
        description="Digest of the spec.source that the four fields above belong to.",
    )
    config_hash: str | None = Field(
        None, max_length=64, description="Digest of the configuration that was pushed last."
    )
    queue_seconds: float | None = Field(
        None, ge=0, description="Predicted wait of a new request, in seconds."
    )
    gpu_hour_cost: float | None = Field(
        None, ge=0, description="Cost of all GPUs in use for an hour, in the chart's currency."
    )
    last_failure: Retried | None = Field(None, description="What went wrong last.")


class ImageModel(Resource):
    """A servable model."""

    rules = (
        name_rule(LONGEST_NAME, "its Service and its Ray cluster are named after it", LABEL),
        Rule(
            lambda m: (
                m.spec.fallback is None
                or m.spec.fallback.model_ref.name != m.metadata.name
                or m.spec.fallback.model_ref.namespace not in (None, m.metadata.namespace)
            ),
            "!has(self.spec.fallback) || self.spec.fallback.modelRef.name != self.metadata.name "
            "|| has(self.spec.fallback.modelRef.namespace)",
            "spec.fallback.modelRef names the model itself: name another one or remove fallback",
            ".spec.fallback.modelRef",
        ),
        Rule(
            lambda m: m.metadata.name not in m.spec.aliases,
            "!has(self.spec.aliases) || !(self.metadata.name in self.spec.aliases)",
            "spec.aliases holds the model's own name, which it has anyway: remove it there",
            ".spec.aliases",
        ),
    )

    kind: Literal["ImageModel"] = "ImageModel"
    spec: ImageModelSpec

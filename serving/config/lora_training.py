"""LoRATraining: from pictures to a LoRAAdapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calotype.serving.config.base import (
    LABEL,
    Matches,
    ModelRef,
    Name,
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
    unchanged,
)
from calotype.serving.config.conditions import Retried, Status, Time
from calotype.serving.config.lora_adapter import Access, Probe, Scale
from calotype.serving.config.model.sampling import PATCH
from calotype.serving.config.namespaces import LabelValue
from calotype.serving.config.sources import CREDENTIALS, HttpSource, OneOf, S3Source, VolumeSource

LONGEST_NAME = 40
"""KubeRay adds up to 23 characters to the name of a RayJob, of 63 that a label may have."""

AssetId = Annotated[
    str,
    Field(min_length=1, max_length=128),
    Matches(
        r"[A-Za-z0-9][A-Za-z0-9_-]*",
        "an asset's id has letters, digits, '-' and '_', as the API gives it",
    ),
]


class Assets(Spec):
    """Pictures that were uploaded through the API."""

    ids: Annotated[list[AssetId], Unique()] = Field(
        min_length=1, max_length=1000, description="Ids of the uploaded pictures or archives."
    )


class Dataset(OneOf):
    """Pictures with captions: a folder, or a zip or tar archive; exactly one field."""

    s3: S3Source | None = Field(None, description="An S3 bucket.")
    persistent_volume_claim: VolumeSource | None = Field(None, description="A volume.")
    http: HttpSource | None = Field(None, description="An archive on a web server.")
    assets: Assets | None = Field(None, description="Pictures uploaded through the API.")


class Caption(Spec):
    """What is said about each picture while it is learnt."""

    trigger_word: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Word put before every caption, which evokes the adapter later. Default: none.",
    )
    fallback: str | None = Field(
        None,
        min_length=1,
        max_length=4000,
        description="Caption of pictures that have none. Default: such a picture is an error.",
    )
    dropout: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of steps that see no caption, from 0 to 1; 0 = every step sees one.",
    )


class Output(OneOf):
    """Where the finished adapter and its checkpoints are written; exactly one field."""

    s3: S3Source | None = Field(None, description="A prefix in an S3 bucket.")
    persistent_volume_claim: VolumeSource | None = Field(None, description="A folder of a volume.")


class TemplateMetadata(Spec):
    """Name and labels of the LoRAAdapter to be made."""

    name: Name | None = Field(None, description="Its name. Default: the name of the training.")
    labels: dict[str, LabelValue] = Field(
        default_factory=dict, max_length=32, description="Its labels, key to value."
    )
    annotations: dict[str, Annotated[str, Field(max_length=4096)]] = Field(
        default_factory=dict, max_length=32, description="Its annotations, key to value."
    )


class TemplateSpec(Spec):
    """What the LoRAAdapter says beside its model and its source."""

    scale: Scale = Field(default_factory=Scale, description="Allowed scales.")
    trigger_words: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list,
        max_length=32,
        description="Words that evoke it. Default: caption.triggerWord, where there is one.",
    )
    preload: Literal["Always", "OnDemand"] = Field(
        "OnDemand", description="As spec.preload of a LoRAAdapter."
    )
    access: Access = Field(default_factory=Access, description="Who may use it.")
    moderation_policy_ref: PolicyRef | None = Field(
        None, description="ModerationPolicy of this namespace. Default: the model's."
    )
    probe: Probe | None = Field(
        None, description="Picture that is drawn after a load. Default: none."
    )


class AdapterTemplate(Spec):
    """The LoRAAdapter that a finished training makes."""

    metadata: TemplateMetadata = Field(
        default_factory=TemplateMetadata, description="Name and labels."
    )
    spec: TemplateSpec = Field(default_factory=TemplateSpec, description="Its settings.")


_UNCHANGED = (
    "modelRef",
    "dataset",
    "caption",
    "rank",
    "steps",
    "learningRate",
    "resolution",
    "seed",
    "resourceProfile",
    "output",
)


class LoRATrainingSpec(Spec):
    """From pictures to a LoRAAdapter."""

    rules = (
        Rule(
            lambda s: s.resolution % PATCH == 0,
            "self.resolution % 16 == 0",
            "resolution must be a multiple of 16, for example 512 or 1024",
            ".resolution",
        ),
    )
    transitions = (
        Transition(
            " && ".join(unchanged(name) for name in _UNCHANGED),
            "what a training learns cannot be changed once it exists (only suspend, "
            "credentialsSecretRef, activeDeadlineSeconds and adapterTemplate can): create another "
            "LoRATraining",
        ),
    )

    model_ref: ModelRef = Field(description="The model that the adapter is for.")
    dataset: Dataset = Field(description="Pictures with captions; exactly one field.")
    credentials_secret_ref: SecretRef | None = Field(None, description=CREDENTIALS)
    caption: Caption = Field(default_factory=Caption, description="What is said about pictures.")
    rank: int = Field(16, ge=1, le=256, description="LoRA rank: how much the adapter can hold.")
    steps: int = Field(1000, ge=1, le=1_000_000, description="Training steps.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Learning rate.")
    resolution: int = Field(
        1024, ge=64, le=4096, description="Side of the learnt pictures, in pixels, of 16."
    )
    seed: int = Field(0, ge=0, le=2**53, description="Seed of noise and order.")
    resource_profile: ProfileName = Field(
        "default", description="Profile of the chart's resourceProfiles for the trainer."
    )
    output: Output | None = Field(
        None, description="Where the adapter is written. Default: the volume of the release."
    )
    adapter_template: AdapterTemplate = Field(
        default_factory=AdapterTemplate, description="The LoRAAdapter that it makes."
    )
    active_deadline_seconds: int | None = Field(
        None,
        ge=60,
        le=31_536_000,
        description="It fails when it has run longer, in seconds. Default: no limit.",
    )
    suspend: bool = Field(
        False, description="true: no pods; it goes on from its last checkpoint afterwards."
    )


class Sample(StatusModel):
    """A picture drawn while training."""

    step: int = Field(ge=0, description="Step after which it was drawn.")
    url: str = Field(max_length=2048, description="Where it is.")


class AdapterName(StatusModel):
    """The LoRAAdapter that was made."""

    name: str = Field(max_length=253, description="Its name.")
    namespace: str | None = Field(None, max_length=63, description="Its namespace.")


class LoRATrainingStatus(Status):
    """What the operator knows about a training."""

    phase: (
        Literal["Pending", "Starting", "Running", "Succeeded", "Failed", "Suspended", "Terminating"]
        | None
    ) = Field(None, description="Where the training is in its life, in one word.")
    step: int | None = Field(None, ge=0, description="Steps that are done.")
    total_steps: int | None = Field(None, ge=0, description="Steps in all.")
    progress: str | None = Field(
        None, max_length=32, description="step/totalSteps, for `kubectl get`."
    )
    loss: float | None = Field(None, description="Mean loss of the last steps.")
    eta_seconds: float | None = Field(
        None, ge=0, description="When it will be finished, in seconds from now."
    )
    job_name: str | None = Field(
        None, max_length=253, description="Name of the RayJob, in this namespace."
    )
    start_time: Time | None = Field(None, description="When it began to train, in UTC.")
    completion_time: Time | None = Field(None, description="When it ended, in UTC.")
    samples: list[Sample] = Field(
        default_factory=list, max_length=32, description="Pictures drawn on the way, newest last."
    )
    adapter_ref: AdapterName | None = Field(None, description="The LoRAAdapter that was made.")
    last_failure: Retried | None = Field(None, description="What went wrong last.")


class LoRATraining(Resource):
    """From pictures to a LoRAAdapter."""

    rules = (name_rule(LONGEST_NAME, "its Ray job is named after it", LABEL),)

    kind: Literal["LoRATraining"] = "LoRATraining"
    spec: LoRATrainingSpec

"""LoRAAdapter: an adapter of one model, a LoRA or a control branch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calotype.serving.config.base import (
    ModelRef,
    Name,
    PolicyRef,
    Resource,
    Rule,
    SecretRef,
    Sha256,
    Spec,
    StatusModel,
    Transition,
    Unique,
    name_rule,
)
from calotype.serving.config.conditions import Retried, Status
from calotype.serving.config.model.acceptance import (
    MOST_ACCEPTED,
    Acceptance,
    AcceptedRevision,
)
from calotype.serving.config.sources import CREDENTIALS, Source

LONGEST_NAME = 63
"""The name is the value of a label."""
MOST_LOAD_STATES = 32


class Scale(Spec):
    """How strongly a request may apply an adapter; 0 = not at all."""

    rules = (
        Rule(
            lambda s: s.min <= s.default <= s.max,
            "self.min <= self.default && self.default <= self.max",
            "scale wants min <= default <= max: the default must lie between the two",
            ".default",
        ),
    )

    default: float = Field(1.0, ge=-10, le=10, description="Scale where a request names none.")
    min: float = Field(0.0, ge=-10, le=10, description="Smallest scale of a request.")
    max: float = Field(1.5, ge=-10, le=10, description="Largest scale of a request.")


class Access(Spec):
    """Who may use an adapter."""

    teams: Annotated[list[Name], Unique()] = Field(
        default_factory=list,
        max_length=64,
        description="Names of Teams; keys of others get an error, and do not see the adapter. "
        "Default: everybody who may use the model.",
    )


class Probe(Spec):
    """A picture that is drawn after every load; a replica that cannot draw it is not ready."""

    prompt: str = Field(
        min_length=1, max_length=4000, description="What is drawn; it is checked as any prompt."
    )
    seed: int = Field(1, ge=0, le=2**53, description="Seed of the picture.")


class LoRAAdapterSpec(Spec):
    """An adapter of one model."""

    rules = (
        Rule(
            lambda s: s.type == "lora" or s.probe is None,
            "self.type == 'lora' || !has(self.probe)",
            "a control adapter draws nothing without a map, so it has no probe: leave probe out",
            ".probe",
        ),
        Rule(
            lambda s: s.type == "lora" or (s.scale.min >= 0 and s.scale.max <= 2),
            "self.type == 'lora' || (self.scale.min >= 0.0 && self.scale.max <= 2.0)",
            "a control adapter is applied at scales of 0 to 2: give scale.min and scale.max in it",
            ".scale",
        ),
        Rule(
            lambda s: (
                s.sha256 is None
                or s.source.http is None
                or s.source.http.sha256 in (None, s.sha256)
            ),
            "!has(self.sha256) || !has(self.source.http) || !has(self.source.http.sha256) || "
            "self.sha256 == self.source.http.sha256",
            "sha256 and source.http.sha256 differ, so that no file could have both: keep one",
            ".sha256",
        ),
    )

    model_ref: ModelRef = Field(
        description="The model it was trained on. It cannot be changed once the adapter's file "
        "has been checked."
    )
    type: Literal["lora", "control"] = Field(
        "lora",
        description="lora: low-rank changes of the model's layers, named in loras. control: a "
        "branch beside the model that follows a map, named in controlnets.",
    )
    source: Source = Field(description="Where the safetensors file comes from; exactly one field.")
    credentials_secret_ref: SecretRef | None = Field(None, description=CREDENTIALS)
    sha256: Sha256 | None = Field(
        None,
        description="The file must have this digest. Default: any is taken, and reported.",
    )
    scale: Scale = Field(default_factory=Scale, description="Allowed scales.")
    trigger_words: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list, max_length=32, description="Words that evoke it."
    )
    preload: Literal["Always", "OnDemand"] = Field(
        "OnDemand",
        description="Always: in device memory from the start and never evicted. OnDemand: checked "
        "and on the replica's disk, in device memory when a request names it.",
    )
    access: Access = Field(default_factory=Access, description="Who may use it.")
    moderation_policy_ref: PolicyRef | None = Field(
        None,
        description="ModerationPolicy of this namespace for requests that name the adapter; "
        "stricter than the model's, never laxer. Default: the model's.",
    )
    probe: Probe | None = Field(
        None, description="Picture that is drawn after a load. Default: none."
    )
    acceptance: Acceptance | None = Field(
        None,
        description="What a new revision must show. With it, one serves when the annotation "
        "calotype.dev/accepted names its sha256, and the revision before it until then; naming an "
        "earlier sha256 goes back to it. Default: every checked revision serves.",
    )
    suspend: bool = Field(False, description="true: it is not loaded and not on offer.")


class AdapterReplicas(StatusModel):
    """Where an adapter is loaded."""

    desired: int = Field(0, ge=0, description="Replicas that should have it.")
    loaded: int = Field(0, ge=0, description="Replicas that have it.")
    failed: int = Field(0, ge=0, description="Replicas that cannot load it.")


class LoadState(StatusModel):
    """One replica's word on an adapter."""

    replica: str = Field(max_length=253, description="Name of the Serve replica.")
    node: str | None = Field(None, max_length=253, description="Node that it runs on.")
    revision: str | None = Field(
        None, max_length=1024, description="Revision that the replica has or tries."
    )
    state: Literal["loading", "ready", "failed", "missing"] = Field(
        description="What became of it there."
    )
    message: str | None = Field(None, max_length=4096, description="Why it failed.")
    load_milliseconds: float | None = Field(
        None, ge=0, description="How long the load took, in milliseconds."
    )


class LoRAAdapterStatus(Status):
    """What the operator knows about an adapter."""

    phase: (
        Literal[
            "Pending",
            "Resolving",
            "Fetching",
            "Checking",
            "Loading",
            "Ready",
            "Degraded",
            "Failed",
            "Suspended",
            "Terminating",
        ]
        | None
    ) = Field(None, description="Where the adapter is in its life, in one word.")
    resolved_revision: str | None = Field(
        None, max_length=1024, description="The commit, version or digest that is loaded."
    )
    sha256: str | None = Field(None, max_length=64, description="Digest of the file.")
    size_bytes: int | None = Field(None, ge=0, description="Size of the file, in bytes.")
    rank: int | None = Field(None, ge=1, description="LoRA rank.")
    target_modules: list[Annotated[str, Field(max_length=253)]] = Field(
        default_factory=list,
        max_length=64,
        description="Kinds of layers that it changes, such as attn.to_q.",
    )
    path: str | None = Field(
        None, max_length=4096, description="The checked file inside the model's pods."
    )
    source_hash: str | None = Field(
        None,
        max_length=64,
        description="Digest of the spec.source and spec.sha256 that revision, digest, size, rank "
        "and path belong to; another than the present one while a new revision is fetched.",
    )
    accepted_revisions: list[AcceptedRevision] = Field(
        default_factory=list,
        max_length=MOST_ACCEPTED,
        description="Revisions that were accepted, newest last.",
    )
    loaded: str | None = Field(
        None, max_length=32, description="replicas.loaded/replicas.desired, for `kubectl get`."
    )
    replicas: AdapterReplicas | None = Field(None, description="Where it is loaded.")
    load_states: list[LoadState] = Field(
        default_factory=list,
        max_length=MOST_LOAD_STATES,
        description=f"Every replica's word, {MOST_LOAD_STATES} at most, failures first.",
    )
    last_failure: Retried | None = Field(None, description="What went wrong last.")


class LoRAAdapter(Resource):
    """An adapter of one model, a LoRA or a control branch."""

    rules = (name_rule(LONGEST_NAME, "labels hold it"),)
    transitions = (
        Transition(
            "self.spec.modelRef == oldSelf.spec.modelRef || !has(oldSelf.status) || "
            "!has(oldSelf.status.sha256)",
            "spec.modelRef cannot be changed after the adapter was checked for its model: delete "
            "it and create it for the other model",
            ".spec.modelRef",
        ),
    )

    kind: Literal["LoRAAdapter"] = "LoRAAdapter"
    spec: LoRAAdapterSpec

"""Which adapters a model takes, and what its replicas say of them.

Pure. `admit` looks at all adapters of all models at once, oldest first, and says why some must
wait: their namespace, a name that is taken, a policy, or no room. A refused adapter is admitted as
soon as the cause is gone; nobody needs to touch it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from calotype.operator.api.conditions import Reason
from calotype.operator.kube.labels import digest
from calotype.operator.kube.objects import Address, Manifest, Object, shown
from calotype.operator.manifests.custom_resources import Weights
from calotype.operator.manifests.fetch_job import FetchTask
from calotype.operator.manifests.pods import ADAPTER_SOURCE_DIR, CACHE_DIR, TRAININGS_DIR
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.weights import source_json
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import (
    ImageModel,
    LoadState,
    LoRAAdapter,
    ModelSource,
    Source,
    bytes_of,
)
from calotype.serving.config.base import leads_up
from calotype.serving.wire.fetch_order import FetchOrder
from calotype.serving.wire.model_status import AdapterState, ReplicaState

PATH_BYTES = 300
"""Room kept for the path, digest and revision of an adapter that is not fetched yet."""
MOST_LOAD_STATES = 32
MESSAGE_CHARS = 4096
_State = Literal["failed", "missing", "loading", "ready"]
_STATE_ORDER: dict[_State, int] = {"failed": 0, "missing": 1, "loading": 2, "ready": 3}


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter as far as the others are concerned."""

    address: Address
    created: str
    model: Address
    adapter: LoRAAdapter
    size: int
    """Bytes of its rendered manifest."""
    policy_problem: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """A model as far as adapters are concerned."""

    model: ImageModel
    refusal: Refusal | None = None
    """Why the model itself is not accepted."""
    rivals: str | None = None
    """Which other models ask for one of its names; None = nobody does."""


def candidate_model(adapter: LoRAAdapter) -> Address:
    ref = adapter.spec.model_ref
    return (ref.namespace or adapter.metadata.namespace, ref.name)


def admit(
    candidates: Iterable[Candidate],
    hosts: Mapping[Address, Host],
    namespace_labels: Mapping[str, Mapping[str, str]],
    settings: OperatorSettings,
) -> dict[Address, Refusal]:
    """Address -> why it is refused; those that are not in it are admitted."""
    refused: dict[Address, Refusal] = {}
    names: dict[tuple[Address, str], Address] = {}
    counts: dict[Address, int] = {}
    sizes: dict[Address, int] = {}
    total = 0
    for candidate in sorted(candidates, key=lambda c: (c.created, c.address)):
        refusal = _unsuited(candidate, hosts, namespace_labels, settings)
        if refusal is None:
            taken = names.setdefault((candidate.model, candidate.adapter.name), candidate.address)
            if taken != candidate.address:
                refusal = Refusal(
                    Reason.NAME_CONFLICT,
                    f"Model {shown(candidate.model)} has an adapter of this name already, "
                    f"{shown(taken)}: requests know adapters by their name. Give this one "
                    "another name, or delete the other one.",
                )
        if refusal is None and not candidate.adapter.spec.suspend:
            count = counts.get(candidate.model, 0) + 1
            size = sizes.get(candidate.model, 0) + candidate.size
            refusal = _too_much(candidate, count, size, total + candidate.size, settings)
            if refusal is None:
                counts[candidate.model], sizes[candidate.model] = count, size
                total += candidate.size
        if refusal is not None:
            refused[candidate.address] = refusal
    return refused


def _unsuited(
    candidate: Candidate,
    hosts: Mapping[Address, Host],
    namespace_labels: Mapping[str, Mapping[str, str]],
    settings: OperatorSettings,
) -> Refusal | None:
    host = hosts.get(candidate.model)
    if host is None:
        return Refusal(
            Reason.MODEL_MISSING,
            f"There is no ImageModel {shown(candidate.model)} in a namespace that the operator "
            "watches. Correct spec.modelRef, or create the model.",
        )
    if host.model.spec.source.provider is not None:
        return Refusal(
            Reason.MODEL_UNSUITABLE,
            f"Model {shown(candidate.model)} is drawn by a provider, which takes no adapters.",
        )
    if not _allowed(candidate, host.model, namespace_labels):
        return Refusal(
            Reason.NAMESPACE_NOT_ALLOWED,
            f"Model {shown(candidate.model)} takes no adapters of namespace "
            f"{candidate.address[0]}: its owner can allow that in spec.adapters.namespaces, or "
            "put the adapter into the model's namespace.",
        )
    path = relative_path(candidate.adapter.spec.source) or _strange_path(candidate, settings)
    if path is not None:
        return path
    claim = candidate.adapter.spec.source.persistent_volume_claim
    if claim is not None and candidate.address[0] != candidate.model[0]:
        return Refusal(
            Reason.VOLUME_MISSING,
            f"The volume {claim.claim_name} of namespace {candidate.address[0]} cannot be mounted "
            f"in namespace {candidate.model[0]}, where the model is: put the adapter there, or "
            "use another source.",
        )
    return candidate.policy_problem


def relative_path(source: Source | ModelSource) -> Refusal | None:
    """A path that is relative to a file means nothing in a cluster."""
    if source.path is None or source.path.startswith("/"):
        return None
    return Refusal(
        Reason.PATH_NOT_ABSOLUTE,
        f"spec.source.path is {source.path!r}, relative to a file that a cluster does not see: "
        "write the absolute path inside the model's pods, or use another source.",
    )


def path_root(adapter: LoRAAdapter, settings: OperatorSettings) -> str | None:
    """The folder that an adapter's source.path lies in, of those that it may; None = in none."""
    path = adapter.spec.source.path
    if path is None or leads_up(path):
        return None
    folders = (f"{TRAININGS_DIR}/{adapter.metadata.namespace}", *settings.adapter_folders)
    file = pathlib.PurePosixPath(path)
    return next((folder for folder in folders if file.is_relative_to(folder)), None)


def _strange_path(candidate: Candidate, settings: OperatorSettings) -> Refusal | None:
    path = candidate.adapter.spec.source.path
    if path is None or path_root(candidate.adapter, settings) is not None:
        return None
    allowed = ", ".join(settings.adapter_folders) or "none"
    return Refusal(
        Reason.PATH_NOT_ALLOWED,
        f"spec.source.path is {path!r}, in no folder that an administrator allows (adapterFolders "
        f"of operator.settings: {allowed}): use another source, or have its folder allowed.",
    )


def _allowed(
    candidate: Candidate, model: ImageModel, namespace_labels: Mapping[str, Mapping[str, str]]
) -> bool:
    namespaces = model.spec.adapters.namespaces
    namespace = candidate.address[0]
    if namespace == candidate.model[0] or namespaces.from_ == "All":
        return True
    if namespaces.from_ != "Selector" or namespaces.selector is None:
        return False
    labels = namespace_labels.get(namespace)
    return labels is not None and namespaces.selector.matches(dict(labels))


def _too_much(
    candidate: Candidate, count: int, size: int, total: int, settings: OperatorSettings
) -> Refusal | None:
    model, most = shown(candidate.model), settings.max_adapters_per_model
    if count > most:
        return Refusal(
            Reason.CAPACITY_EXCEEDED,
            f"Model {model} has {most} adapters, the most that it may have "
            "(maxAdaptersPerModel). This one is taken as soon as another one is deleted.",
        )
    bound = settings.max_config_bytes
    if max(size, total) > bound:
        return Refusal(
            Reason.CAPACITY_EXCEEDED,
            f"The configuration of {model} would have {max(size, total):,} bytes with this "
            f"adapter, more than the {bound:,} that fit into one object of the API server. It is "
            "taken as soon as others are deleted, or their trigger words are shortened.",
        )
    return None


def fits(model: ImageModel, rank: int | None, size: int | None) -> Refusal | None:
    """Whether a checked file is within the limits that the model has now."""
    limits = model.spec.adapters
    if rank is not None and rank > limits.max_rank:
        return Refusal(
            "RankTooHigh",
            f"The adapter has rank {rank}, but model {model.name} loads {limits.max_rank} at most "
            "(spec.adapters.maxRank of the model).",
        )
    budget = bytes_of(limits.memory_budget)
    if size is not None and size > budget:
        return Refusal(
            "TooLarge",
            f"The file has {size:,} bytes, but all adapters of a replica of {model.name} share "
            f"{limits.memory_budget} (spec.adapters.memoryBudget of the model).",
        )
    return None


def adapter_task(
    owner: Object,
    adapter: LoRAAdapter,
    model: ImageModel,
    model_owner: Object,
    base: Manifest,
    secret_version: str,
    attempt: int,
    settings: OperatorSettings,
) -> FetchTask:
    """The Job that resolves, fetches and checks an adapter for its model."""
    source = source_json(adapter.spec.source)
    limits = model.spec.adapters
    ref = adapter.spec.credentials_secret_ref
    pin = adapter.spec.sha256
    if pin is None and adapter.spec.source.http is not None:
        pin = adapter.spec.source.http.sha256
    most = bytes_of(limits.memory_budget)
    crosses = adapter.metadata.namespace != model.metadata.namespace
    root = path_root(adapter, settings)
    if adapter.spec.source.persistent_volume_claim is not None:
        root = ADAPTER_SOURCE_DIR
    order = FetchOrder(
        kind="adapter",
        name=adapter.name,
        namespace=adapter.metadata.namespace,
        source=adapter.spec.source,
        sha256=pin,
        cache_dir=pathlib.Path(CACHE_DIR),
        max_bytes=most,
        adapter_type=adapter.spec.type,
        max_rank=limits.max_rank,
        model=ImageModel.model_validate(base),
        volume_dir=pathlib.Path(root) if root is not None else None,
    )
    return FetchTask(
        order=order,
        owner=owner,
        namespace=model.metadata.namespace,
        model=model.name,
        fingerprint=digest(
            [source, adapter.spec.type, pin, most, limits.max_rank, base["spec"], secret_version]
        ),
        attempt=attempt,
        credentials=ref.name if ref is not None else None,
        job_owner=model_owner if crosses else None,
    )


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What the replicas of a model say of one adapter."""

    desired: int
    loaded: int
    failed: int
    states: tuple[LoadState, ...]
    """``status.loadStates``: failures first."""
    old_serving: int
    """Replicas that still draw with another revision."""

    @property
    def text(self) -> str:
        return f"{self.loaded}/{self.desired}"

    @property
    def first_failure(self) -> str:
        return next((s.message or "" for s in self.states if s.state == "failed"), "")


def summarise(name: str, weights: Weights | None, replicas: Sequence[ReplicaState]) -> LoadSummary:
    """Counts over the replicas that draw; one that is still starting is not counted.

    Args:
        weights: what shall be loaded; None = the source itself, of which there is one revision.
        replicas: of the model app's status.
    """
    wanted = {weights.sha256, weights.revision} - {""} if weights is not None else set()
    states: list[LoadState] = []
    old = 0
    for replica in replicas:
        if not replica.ready:
            continue
        load = replica.adapters.get(name, AdapterState())
        state = load.state
        other = bool(wanted and load.revision and load.revision not in wanted)
        if state == "ready" and other:
            state = "loading"
            old += 1
        elif state != "ready" and load.serving_revision:
            old += 1
        states.append(
            LoadState(
                replica=replica.replica,
                node=replica.node or None,
                revision=load.revision or None,
                state=_known_state(state),
                message=(load.message[:MESSAGE_CHARS] or None) if state == "failed" else None,
                load_milliseconds=load.load_milliseconds,
            )
        )
    states.sort(key=lambda s: (_STATE_ORDER[s.state], s.replica))
    return LoadSummary(
        desired=len(states),
        loaded=sum(s.state == "ready" for s in states),
        failed=sum(s.state == "failed" for s in states),
        states=tuple(states[:MOST_LOAD_STATES]),
        old_serving=old,
    )


def _known_state(word: str) -> _State:
    """A state of a later version of the model app counts as none."""
    return next((state for state in _STATE_ORDER if state == word), "missing")

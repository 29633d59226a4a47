"""What a service is given: manifests, by which policies they check, and a data folder.

Checked here before anything starts. Imports no Ray: what is refused is refused at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.strictness import laxer_at
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.cluster.supervisor import START_SECONDS
from calotype.serving.config import (
    ImageModel,
    LoRAAdapter,
    Manifests,
    Team,
    load_manifests,
    with_defaults,
)
from calotype.serving.core.errors import InvalidRequest, StorageFailed
from calotype.serving.weights.merging.merged_source import with_merged_source
from calotype.serving.weights.shelf import FOLDER as SHELF
from calotype.serving.weights.sources import REVISION_ANNOTATION, adapter_file, model_folder
from calotype.serving.wire.application import ModeratorConfig, NamedPolicy

if TYPE_CHECKING:
    from calotype.serving.database.database import Database

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    host: str
    port: int
    data_dir: pathlib.Path
    manifests: Sequence[pathlib.Path] = ()
    threads: int = 1
    api_key: str | None = None
    ray_start_seconds: float = START_SECONDS
    """What Ray's own start may take before it is tried again."""
    say: Callable[[str], None] = field(default=print)
    """Where sentences for the person at the terminal go."""

    def places(self) -> list[pathlib.Path]:
        """The manifests, and those of adapters that were trained and accepted here."""
        return [*self.manifests, *sorted((self.data_dir / SHELF).glob("*.yaml"))]


def read_resources(paths: Sequence[pathlib.Path]) -> Manifests:
    """Manifests with the defaults of the package, checked as far as no model is needed for it.

    Raises:
        CalotypeError: something in them cannot be used.
    """
    resources = with_defaults(load_manifests(paths))
    Catalog(resources.models, resources.adapters)
    models = [with_merged_source(model) for model in resources.models]
    for model in models:
        model_folder(model)
    adapters = [_with_revision(adapter) for adapter in resources.adapters]
    check_policies(resources)
    return resources.model_copy(update={"models": models, "adapters": adapters})


def _with_revision(adapter: LoRAAdapter) -> LoRAAdapter:
    """The adapter with its file's time and size noted: a changed file is a changed user_config."""
    stat = adapter_file(adapter).stat()
    noted = {"annotations": {REVISION_ANNOTATION: f"{stat.st_mtime_ns}-{stat.st_size}"}}
    metadata = adapter.metadata.model_copy(update=noted)
    return adapter.model_copy(update={"metadata": metadata})


@contextlib.contextmanager
def claimed(data_dir: pathlib.Path) -> Iterator[None]:
    """The data folder for this process alone: two services on one database would fight."""
    lock: IO[str]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "serve.lock").open("w")
    except OSError as error:
        raise StorageFailed(
            f"The data folder {data_dir} cannot be written ({error.strerror}); "
            "name another one with --data-dir."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidRequest(
                f"Another calotype serve uses the data folder {data_dir}; end it, or name another "
                "folder with --data-dir and another port with --port."
            ) from None
        yield


def moderation_of(model: ImageModel, manifests: Manifests) -> ModeratorConfig:
    """The model's policy, and those that are named beside it."""
    base = _base(model, manifests)
    named = {
        ref.name
        for owner in _named_by(model, manifests)
        if (ref := owner.spec.moderation_policy_ref) is not None
    }
    own = None if base is None else NamedPolicy(name=base, spec=manifests.policies[base])
    beside = {name: manifests.policies[name] for name in sorted(named)}
    return ModeratorConfig(policy=own, policies=beside)


def check_policies(manifests: Manifests) -> None:
    """Reads every policy, and compares those of teams and adapters with the model's.

    Raises:
        InvalidRequest: one says what no policy may say, or is laxer; names policy and field.
    """
    try:
        read = {name: Policy.from_spec(name, spec) for name, spec in manifests.policies.items()}
    except PolicyError as error:
        raise InvalidRequest(str(error)) from error
    for model in manifests.models:
        name = _base(model, manifests)
        base = Policy.default() if name is None else read[name]
        for owner in _named_by(model, manifests):
            ref = owner.spec.moderation_policy_ref
            place = laxer_at(read[ref.name], base) if ref is not None else None
            if ref is not None and place is not None:
                raise InvalidRequest(
                    f"{owner.kind} {owner.name}: ModerationPolicy {ref.name} is laxer than "
                    f"{base.name!r}, which the model {model.name} has: {place}. A policy beside "
                    "the model's may only be stricter."
                )


def declare_teams(database: Database, before: Sequence[Team], now: Sequence[Team]) -> None:
    """Makes weights, limits and policies of teams what their manifests say.

    Keys are made by `calotype keys create --team`; a team whose manifest went has no limits left.

    Args:
        before: those whose manifests were there when this was called last.
    """
    for team in before:
        if all(team.name != other.name for other in now):
            database.api_keys.declare_team({"name": team.name})
    for team in now:
        spec = team.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        policy = (spec.get("moderationPolicyRef") or {}).get("name")
        database.api_keys.declare_team({"name": team.name, **spec, "moderationPolicy": policy})


def _base(model: ImageModel, manifests: Manifests) -> str | None:
    """The model's policy: the one that it names, or ``default``, or one that nobody names."""
    ref = model.spec.moderation_policy_ref
    if ref is not None:
        return ref.name
    if DEFAULT in manifests.policies:
        return DEFAULT
    owners: list[ImageModel | LoRAAdapter | Team] = [
        *manifests.models,
        *manifests.adapters,
        *manifests.teams,
    ]
    refs = [owner.spec.moderation_policy_ref for owner in owners]
    named = {ref.name for ref in refs if ref is not None}
    return next((name for name in manifests.policies if name not in named), None)


def _named_by(model: ImageModel, manifests: Manifests) -> Iterator[LoRAAdapter | Team]:
    """Teams and adapters that name a policy for requests to the model."""
    for adapter in manifests.adapters:
        if adapter.spec.model_ref.name == model.name and adapter.spec.moderation_policy_ref:
            yield adapter
    for team in manifests.teams:
        if team.spec.moderation_policy_ref is not None:
            if not team.spec.models or model.name in team.spec.models:
                yield team

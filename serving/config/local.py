"""What a machine without a cluster makes of manifests that were written for one.

Fields that only place pods (resource profiles, caches, licences, autoscaling of text encoders) mean
nothing here and are passed over; a field that would change what is drawn, or who may see it, is
refused by name.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence

from pydantic.alias_generators import to_camel

from calotype.serving.config.files import ManifestError, Manifests, read_manifests
from calotype.serving.config.lora_adapter import LoRAAdapter
from calotype.serving.config.model.image_model import ImageModel
from calotype.serving.config.sources import ModelSource, Source
from calotype.serving.config.team import Team

log = logging.getLogger(__name__)

SERVED_HERE = {"built_in", "path", "hugging_face"}


def load_manifests(paths: Sequence[pathlib.Path]) -> Manifests:
    """Reads files and folders, and keeps what this machine serves.

    Suspended models and adapters are left out; trainings too, with a word in the log.

    Raises:
        ManifestError: something in them is wrong, or wants a cluster; one sentence.
    """
    found = read_manifests(paths)
    _check_references(found)
    for training in found.trainings:
        log.warning(
            "LoRATraining %s is passed over: trainings run in a cluster, by the operator.",
            training.name,
        )
    models = [model for model in found.models if not model.spec.suspend]
    if found.models and not models:
        raise ManifestError(
            "Every ImageModel given says suspend: true, so there is nothing to serve; set it to "
            "false in one of them."
        )
    kept = {model.name for model in models} if models else None
    adapters = [
        adapter
        for adapter in found.adapters
        if not adapter.spec.suspend and (kept is None or adapter.spec.model_ref.name in kept)
    ]
    served: list[ImageModel | LoRAAdapter] = [*models, *adapters]
    for resource in served:
        _check_source(resource)
    return found.model_copy(update={"models": models, "adapters": adapters})


def _check_references(found: Manifests) -> None:
    models: dict[str, ImageModel] = {}
    for model in found.models:
        if model.name in models:
            raise ManifestError(
                f"ImageModel {model.name} stands in two namespaces; one service has one model of a "
                "name: give only one of the two."
            )
        models[model.name] = model
    for adapter in found.adapters:
        _check_model(adapter, models)
    owners: list[ImageModel | LoRAAdapter | Team] = [*found.models, *found.adapters, *found.teams]
    for owner in owners:
        ref = owner.spec.moderation_policy_ref
        if ref is not None and ref.name not in found.policies:
            raise ManifestError(
                f"{owner.kind} {owner.name}: spec.moderationPolicyRef.name is {ref.name!r}, but "
                f"the policies given are {sorted(found.policies)}."
            )


def _check_model(adapter: LoRAAdapter, models: dict[str, ImageModel]) -> None:
    ref = adapter.spec.model_ref
    if not models:
        return
    if ref.name not in models:
        raise ManifestError(
            f"LoRAAdapter {adapter.name}: spec.modelRef.name is {ref.name!r}, but the models given "
            f"are {sorted(models)}."
        )
    metadata = models[ref.name].metadata
    stated = "namespace" in metadata.model_fields_set
    if ref.namespace is not None and stated and ref.namespace != metadata.namespace:
        raise ManifestError(
            f"LoRAAdapter {adapter.name}: spec.modelRef.namespace is {ref.namespace!r}, but the "
            f"ImageModel {ref.name} is in {metadata.namespace!r}."
        )


def _check_source(resource: ImageModel | LoRAAdapter) -> None:
    source = resource.spec.source
    given = next(name for name in type(source).model_fields if getattr(source, name) is not None)
    where = f"{resource.kind} {resource.name}: spec.source.{to_camel(given)}"
    if given == "provider":
        raise ManifestError(
            f"{where} is called by a cluster's gateway only; this machine draws by itself: use "
            "builtIn, path or huggingFace."
        )
    merge = source.merge if isinstance(source, ModelSource) else None
    if merge is not None:
        for place, one in enumerate(merge.models):
            _check_fetched(one.source, f"{where} (model {place + 1} of the merge)")
        return
    _check_fetched(source, where)


def _check_fetched(source: Source, where: str) -> None:
    given = next(name for name in type(source).model_fields if getattr(source, name) is not None)
    if given not in SERVED_HERE:
        raise ManifestError(
            f"{where} is fetched by the operator of a cluster only; download it to this machine "
            "and write source: {path: FILE_OR_FOLDER}."
        )

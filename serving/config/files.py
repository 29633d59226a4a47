"""Manifests from files: what `calotype serve -f` and `kubectl apply -f` both read."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from calotype.serving.config.base import API_VERSION, Metadata, Resource
from calotype.serving.config.lora_adapter import LoRAAdapter
from calotype.serving.config.lora_training import LoRATraining
from calotype.serving.config.model.image_model import ImageModel
from calotype.serving.config.sources import MergedModel, ModelSource, Source
from calotype.serving.config.team import Team
from calotype.serving.core.errors import InvalidRequest

R = TypeVar("R", bound=Resource)


class Manifests(BaseModel):
    """Everything that a set of files declares."""

    models: list[ImageModel] = []
    adapters: list[LoRAAdapter] = []
    policies: dict[str, dict[str, Any]] = {}
    """ModerationPolicy name -> its spec; `moderation.policy` reads it."""
    teams: list[Team] = []
    trainings: list[LoRATraining] = []


class ManifestError(InvalidRequest):
    """A manifest file cannot be used; the message names file, document and field."""


def read_manifests(paths: Sequence[pathlib.Path]) -> Manifests:
    """Reads YAML files, and every ``*.yaml`` and ``*.yml`` of folders.

    Relative ``source.path`` entries are resolved against the file that holds them. Nothing is
    asked of this machine; `local.load_manifests` does that too.

    Raises:
        ManifestError: a file is missing, is no YAML, says something that no resource has, or a
            resource is declared twice.
    """
    found = Manifests(models=[], adapters=[], policies={}, teams=[], trainings=[])
    places: dict[tuple[str, str, str], str] = {}
    for file in _files(paths):
        try:
            documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ManifestError(f"{file}: not valid YAML: {error}") from None
        for number, document in enumerate(documents, start=1):
            if document is not None:
                _add(found, document, file, f"{file}, document {number}", places)
    return found


def _files(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    files: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        if path.is_dir():
            chosen = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        elif path.is_file():
            chosen = [path]
        else:
            raise ManifestError(f"{path}: no such file or folder.")
        for file in chosen:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _add(
    found: Manifests,
    document: Any,
    file: pathlib.Path,
    where: str,
    places: dict[tuple[str, str, str], str],
) -> None:
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: a resource is a mapping with apiVersion and kind.")
    kind = document.get("kind")
    if document.get("apiVersion") != API_VERSION:
        raise ManifestError(
            f"{where}: apiVersion must be {API_VERSION!r}, got {document.get('apiVersion')!r}."
        )
    try:
        if kind == "ImageModel":
            model = _resolved(_validated(ImageModel, document), file)
            metadata = model.metadata
            found.models.append(model)
        elif kind == "LoRAAdapter":
            adapter = _resolved(_validated(LoRAAdapter, document), file)
            metadata = adapter.metadata
            found.adapters.append(adapter)
        elif kind == "Team":
            team = _validated(Team, document)
            metadata = team.metadata
            found.teams.append(team)
        elif kind == "LoRATraining":
            training = _validated(LoRATraining, document)
            metadata = training.metadata
            found.trainings.append(training)
        elif kind == "ModerationPolicy":
            metadata = Metadata.model_validate(document.get("metadata") or {})
            found.policies.setdefault(metadata.name, dict(document.get("spec") or {}))
        else:
            raise ManifestError(
                f"{where}: kind must be ImageModel, LoRAAdapter, ModerationPolicy, Team or "
                f"LoRATraining, got {kind!r}."
            )
    except ValidationError as error:
        raise ManifestError(f"{where} ({kind}): {describe(error)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{where} ({kind}): cannot be written as JSON: {error}.") from None
    first = places.setdefault((kind, metadata.namespace, metadata.name), where)
    if first != where:
        raise ManifestError(
            f"{where}: {kind} {metadata.name} is declared before, in {first}; remove one, or give "
            "it another name."
        )


def _validated(kind: type[R], document: dict[str, Any]) -> R:
    """Reads as strictly as the API server: no "3" for 3, no snake_case names.

    It goes through JSON because Kubernetes' YAML is JSON in another layout: no dates, no tuples.
    """
    text = json.dumps(document, default=str)
    return kind.model_validate_json(text, strict=True, by_alias=True, by_name=False)


def _resolved(resource: Any, file: pathlib.Path) -> Any:
    source = _absolute(resource.spec.source, file)
    if source is resource.spec.source:
        return resource
    return resource.model_copy(update={"spec": resource.spec.model_copy(update={"source": source})})


def _absolute(source: Source, file: pathlib.Path) -> Source:
    """With paths that are relative to the manifest's file made absolute."""
    if source.path is not None:
        path = (file.parent / pathlib.Path(source.path).expanduser()).resolve()
        return source.model_copy(update={"path": str(path)})
    merge = source.merge if isinstance(source, ModelSource) else None
    if merge is None:
        return source

    def moved(one: MergedModel) -> MergedModel:
        return one.model_copy(update={"source": _absolute(one.source, file)})

    inputs = [moved(one) for one in merge.inputs]
    base = None if merge.base is None else moved(merge.base)
    return source.model_copy(
        update={"merge": merge.model_copy(update={"inputs": inputs, "base": base})}
    )


def describe(error: ValidationError) -> str:
    """One sentence for a pydantic error: the field and what is wrong with it, first fault first."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "[key]") or "the document"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{field} is not a field; remove it or correct its spelling{more}."
    return f"{field}: {first['msg'].removeprefix('Value error, ')}{more}."

"""``spec.source.merge``: a model folder that is merged once, and found again by its inputs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator

from calotype.serving.config import ImageModel, MergedModel, MergeSource, ModelSource
from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.engine.sizing.settings import read_json
from calotype.serving.engine.sizing.weight_header import find_weight_headers, fingerprint
from calotype.serving.weights.merging.recipe import MergeInput, MergeRecipe
from calotype.serving.weights.sources import source_folder

STEM = "diffusion_pytorch_model"


def merged_folder(
    merge: MergeSource,
    root: pathlib.Path,
    folder_of: Callable[[MergedModel], pathlib.Path],
    say: Callable[[str], None] = lambda sentence: None,
) -> pathlib.Path:
    """The merged model, below ``root``; made if it is not there yet.

    Processes that want the same merge wait for the first of them.

    Args:
        folder_of: brings an input here.

    Raises:
        InvalidRequest: the inputs are of different models, or their licences forbid it.
        ModelLoadFailed: an input is missing or damaged.
        StorageFailed: the disk is full or read-only.
    """
    folders = [folder_of(one) for one in merge.models]
    target = root / _key(merge, folders)
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        if not target.exists():
            # Imports torch, and only where something is merged.
            from calotype.serving.weights.merging.models import merge_models

            merge_models(_recipe(merge, folders), target, say)
    return target


def _recipe(merge: MergeSource, folders: list[pathlib.Path]) -> MergeRecipe:
    sources = [
        MergeInput(folder, one.weight, licence=one.licence)
        for one, folder in zip(merge.models, folders, strict=True)
    ]
    inputs = tuple(sources[: len(merge.inputs)])
    return MergeRecipe(
        merge.method,
        inputs,
        sources[-1] if merge.base is not None else None,
        density=merge.density,
        seed=merge.seed,
        commercial=merge.commercial,
        licence=merge.licence,
    )


def _key(merge: MergeSource, folders: list[pathlib.Path]) -> str:
    """Of the recipe and of the inputs' weights, wherever they lie."""
    prints: list[str] = []
    for folder in folders:
        part = folder / "transformer"
        headers = find_weight_headers(part, STEM, ModelLoadFailed)
        prints.append(fingerprint(read_json(part / "config.json"), headers))
    recipe = merge.model_dump(mode="json", exclude={"inputs", "base"})
    said = [recipe, [[one.weight, one.licence] for one in merge.models], prints]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _alone(root: pathlib.Path) -> Iterator[None]:
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def with_merged_source(model: ImageModel) -> ImageModel:
    """On one machine: a model that says ``merge`` with the path of what was merged instead.

    Raises:
        InvalidRequest, ModelLoadFailed, StorageFailed: as `merged_folder`.
    """
    merge = model.spec.source.merge
    if merge is None:
        return model
    data_dir = pathlib.Path(os.environ.get("CALOTYPE_DATA_DIR") or "calotype-data")
    root = (data_dir / "cache" / "merged" / model.name).absolute()
    folder = merged_folder(merge, root, lambda one: source_folder(one.source, model.name))
    spec = model.spec.model_copy(update={"source": ModelSource(path=str(folder))})
    return model.model_copy(update={"spec": spec})

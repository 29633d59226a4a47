"""Merged model folders, written shard by shard.

One tensor of each input is in memory at a time, however large the models. The denoiser is merged;
the other parts must be the same in all inputs, and are those of the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import torch

from calotype.serving.core.errors import InvalidRequest, ModelLoadFailed, StorageFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.model.weight_files import DTYPE_NAMES, read_tensor, tensor_bytes
from calotype.serving.engine.sizing.settings import read_json
from calotype.serving.engine.sizing.weight_header import (
    TensorInfo,
    file_digest,
    find_weight_headers,
    fingerprint,
)
from calotype.serving.engine.sizing.weight_writer import write_weights
from calotype.serving.weights.merging.licences import licence_of_folder, merged_licence
from calotype.serving.weights.merging.methods import merge_tensors
from calotype.serving.weights.merging.recipe import MergeInput, MergeRecipe

STEM = "diffusion_pytorch_model"
RECIPE = "merge.json"
_SAME_PARTS = {"vae": STEM, "text_encoder": "model"}
_FLOATS = frozenset(DTYPE_NAMES.values())


class _Weights:
    """The denoiser of one input: tensors by name, over all shards."""

    def __init__(self, source: MergeInput) -> None:
        self.source = source
        self.folder = source.path / "transformer"
        self.config = read_json(self.folder / "config.json")
        self.shards = find_weight_headers(self.folder, STEM, ModelLoadFailed)
        self._places = {name: shard for shard in self.shards for name in shard.tensors}

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: shard.tensors[name] for name, shard in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self._places[name], name).float()

    def digest(self) -> str:
        """Of all weight files."""
        lines = [f"{file_digest(shard.path)}  {shard.path.name}" for shard in self.shards]
        return "sha256:" + _sha256("\n".join(sorted(lines)))


def merge_models(
    recipe: MergeRecipe,
    output: pathlib.Path,
    say: Callable[[str], None] = lambda sentence: None,
) -> JsonObject:
    """Writes a model folder; returns what its ``merge.json`` says.

    Args:
        say: where a sentence for each shard goes.

    Raises:
        InvalidRequest: the inputs are of different models or licences, or the output is there.
        ModelLoadFailed: an input is no model folder, or damaged.
        StorageFailed: the disk is full or read-only; nothing is left under the output's name.
    """
    if output.exists():
        raise InvalidRequest(f"{output} is there already; name another folder.", param="output")
    sources = [*recipe.inputs, *(() if recipe.base is None else (recipe.base,))]
    models = [_Weights(source) for source in sources]
    _check_same(models)
    licence = recipe.licence or merged_licence(
        {str(s.path): s.licence or licence_of_folder(s.path) for s in sources},
        commercial=recipe.commercial,
    )
    say("reading the digests of all inputs")
    digests = {str(model.source.path): model.digest() for model in models}
    kept = recipe.to_json(digests) | {"licence": licence}
    with _whole_or_nothing(output) as part:
        _copy_other_parts(recipe.inputs[0].path, part)
        _write_denoiser(recipe, models, part / "transformer", kept, say)
        (part / RECIPE).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        _write_readme(part, licence, kept)
    return kept


def _write_denoiser(
    recipe: MergeRecipe,
    models: list[_Weights],
    folder: pathlib.Path,
    kept: JsonObject,
    say: Callable[[str], None],
) -> None:
    """The shards of the first input, each written as its tensors are merged."""
    first, inputs = models[0], models[: len(recipe.inputs)]
    base = models[-1] if recipe.base is not None else None
    folder.mkdir()
    for file in first.folder.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, folder / file.name)

    def merged(name: str) -> memoryview:
        values = [model.read(name) for model in inputs]
        weights = [model.source.weight_of(name) for model in inputs]
        origin = None if base is None else base.read(name)
        result = merge_tensors(recipe, name, values, weights, origin)
        if not bool(torch.isfinite(result).all()):
            raise ModelLoadFailed(
                f"{name} of the result holds NaN or infinity: an input is damaged, or the weights "
                "are too large.",
                param=name,
            )
        dtype = _dtype(first.infos[name])
        return tensor_bytes(result.to(dtype))

    metadata = {"format": "pt", "calotype.merge": json.dumps(kept, sort_keys=True)}
    for place, shard in enumerate(first.shards):
        say(f"writing shard {place + 1} of {len(first.shards)}")
        write_weights(folder / shard.path.name, shard.tensors, merged, metadata)


def _check_same(models: list[_Weights]) -> None:
    first = models[0]
    expected = {name: info.shape for name, info in first.infos.items()}
    for info_name, info in first.infos.items():
        if info.dtype not in _FLOATS:
            raise InvalidRequest(
                f"{first.folder} holds {info_name} as {info.dtype}: merge the float weights, and "
                "quantise what comes of it.",
                param="inputs",
            )
    for other in models[1:]:
        found = {name: info.shape for name, info in other.infos.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise InvalidRequest(
                    f"{other.source.path} is another model than {first.source.path}: {name} is "
                    f"{_shown(found.get(name))} there and {_shown(expected.get(name))} here. Merge "
                    "models of one base.",
                    code="adapter_incompatible",
                    param="inputs",
                )
        for key in sorted(first.config.keys() | other.config.keys()):
            if not key.startswith("_") and first.config.get(key) != other.config.get(key):
                raise InvalidRequest(
                    f"{other.source.path} computes otherwise than {first.source.path}: {key} of "
                    f"transformer/config.json is {other.config.get(key)!r} there and "
                    f"{first.config.get(key)!r} here. Merge models of one base.",
                    code="adapter_incompatible",
                    param="inputs",
                )
        for part, stem in _SAME_PARTS.items():
            if _print_of(first.source.path, part, stem) != _print_of(other.source.path, part, stem):
                raise InvalidRequest(
                    f"{other.source.path} has another {part} than {first.source.path}: the merged "
                    "denoiser would not fit both. Merge models of one base.",
                    code="adapter_incompatible",
                    param="inputs",
                )


def _print_of(folder: pathlib.Path, part: str, stem: str) -> str:
    headers = find_weight_headers(folder / part, stem, ModelLoadFailed)
    return fingerprint(read_json(folder / part / "config.json"), headers)


@contextlib.contextmanager
def _whole_or_nothing(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside the output, which takes its name when all is written."""
    part = output.with_name(f".{output.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
        yield part
        os.replace(part, output)
    except OSError as fault:
        raise StorageFailed(
            f"{output} cannot be written: {fault.strerror}. Nothing is left of it.",
            param=str(output),
        ) from fault
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _copy_other_parts(source: pathlib.Path, target: pathlib.Path) -> None:
    """All but the denoiser; hard links where the disk has them, for these are up to 48 GB."""
    for entry in source.iterdir():
        if entry.name in ("transformer", RECIPE, "README.md") or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, copy_function=_linked)
        else:
            _linked(str(entry), str(target / entry.name))


def _linked(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _write_readme(folder: pathlib.Path, licence: str | None, kept: JsonObject) -> None:
    """The licence where `licence_of_folder` and model hubs look for it."""
    names = ", ".join(str(one["name"]) for one in kept["inputs"])
    front = "" if licence is None else f"---\nlicense: {licence}\n---\n\n"
    text = f"{front}A {kept['method']} merge of {names}; `{RECIPE}` has the recipe.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _dtype(info: TensorInfo) -> torch.dtype:
    return next(dtype for dtype, name in DTYPE_NAMES.items() if name == info.dtype)


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(str(n) for n in shape)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

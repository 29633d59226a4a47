"""The engine's own checks, on a CPU: whoever passes here loads on a GPU.

An adapter needs only the configuration of its model, none of its weights.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

import torch

from calotype.serving.config import ImageModel
from calotype.serving.core.errors import AdapterLoadFailed, EngineError, ModelLoadFailed
from calotype.serving.engine.control.control_file import read_branch
from calotype.serving.engine.lora.adapter_fault import AdapterFault
from calotype.serving.engine.lora.lora_file import linear_shapes, read_lora
from calotype.serving.engine.lora.model_fit import LinearShapes
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.model.weight_files import unfilled
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.settings import read_settings
from calotype.serving.engine.sizing.weight_header import (
    WeightHeader,
    find_weight_headers,
    read_header,
)
from calotype.serving.weights.sources import model_folder
from calotype.serving.wire.fetch_faults import Fault, FetchFailed, failed

WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""Folder of a model -> name of its weight files."""
NOT_SAFETENSORS = ("pickled", "not a safetensors file.")
FAULTS: dict[object, Fault] = {
    AdapterFault.WRONG_BASE: Fault.WRONG_BASE_MODEL,
    AdapterFault.WRONG_DTYPE: Fault.WRONG_DTYPE,
    AdapterFault.RANK_TOO_HIGH: Fault.RANK_TOO_HIGH,
    AdapterFault.BAD_WEIGHTS: Fault.BAD_WEIGHTS,
}
"""The engine's word for what is wrong with a file -> that of a fetch; others are about its keys."""


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """What an adapter's file holds."""

    rank: int | None
    """None of a control adapter."""
    target_modules: list[str]
    """Layers that it changes, or that a control adapter has; the numbers of blocks as ``*``."""


def check_adapter(file: pathlib.Path, base: ImageModel, max_rank: int) -> CheckedAdapter:
    """Reads the whole file as a generator would.

    Raises:
        FetchFailed: it would not be loaded there; says why.
    """
    torch.set_num_threads(1)
    shapes = _shapes_of(base)
    _check_header(file)
    try:
        layers = read_lora(file, shapes, max_rank=max_rank, dtype=torch.float32).layers
    except AdapterLoadFailed as error:
        raise _refusal(file, error) from None
    modules = {_starred(module) for module in layers}
    return CheckedAdapter(
        max(int(layer.down.shape[0]) for layer in layers.values()), sorted(modules)
    )


def check_control(file: pathlib.Path, base: ImageModel) -> CheckedAdapter:
    """Reads the whole file as a generator would.

    Raises:
        FetchFailed: it would not be loaded there; says why.
    """
    torch.set_num_threads(1)
    _check_header(file)
    try:
        branch = read_branch(file, _base(base).config, dtype=torch.bfloat16)
    except AdapterLoadFailed as error:
        raise _refusal(file, error) from None
    return CheckedAdapter(None, sorted({_starred(name) for name, _ in branch.named_parameters()}))


def check_model(folder: pathlib.Path) -> None:
    """Looks at every file that a replica will read, and at no weight.

    Raises:
        FetchFailed: something is missing, truncated or of another model.
    """
    try:
        read_settings(folder)
        for part, stem in WEIGHTS.items():
            headers = find_weight_headers(folder / part, stem, ModelLoadFailed)
            if part == "transformer":
                _check_shapes(folder, headers)
        for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
            if not (folder / name).is_file():
                raise ModelLoadFailed(f"{folder / name} is missing.")
    except ModelLoadFailed as error:
        raise failed(Fault.MODEL_INCOMPLETE, _without(folder, error.message)) from None


def _check_shapes(folder: pathlib.Path, headers: list[WeightHeader]) -> None:
    stored = {name: info.shape for header in headers for name, info in header.tensors.items()}
    expected = {name: tuple(t.shape) for name, t in _denoiser(folder).state_dict().items()}
    if stored == expected:
        return
    different = sorted(
        n for n in stored.keys() | expected.keys() if stored.get(n) != expected.get(n)
    )
    first = different[0]
    raise ModelLoadFailed(
        f"{folder / 'transformer'} does not hold what its config.json says: {first} is "
        f"{stored.get(first, 'missing')} instead of {expected.get(first, 'nothing')}, and "
        f"{len(different) - 1} more differ."
    )


def _shapes_of(base: ImageModel) -> LinearShapes:
    return linear_shapes(_base(base))


def _base(base: ImageModel) -> Transformer:
    try:
        return _denoiser(model_folder(base))
    except EngineError as error:
        raise failed(
            Fault.BASE_MODEL_MISSING,
            f"The model {base.name} cannot be looked at: {error.message}",
        ) from None


def _denoiser(folder: pathlib.Path) -> Transformer:
    """The denoiser as its configuration describes it, without memory."""
    file = folder / "transformer" / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        with unfilled():
            return Transformer(TransformerConfig.from_json(config))
    except OSError as error:
        raise ModelLoadFailed(f"{file} cannot be read ({error.strerror}).") from None
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ModelLoadFailed(f"{file} describes no denoiser: {error}.") from None


def _check_header(file: pathlib.Path) -> None:
    try:
        read_header(file, AdapterLoadFailed)
    except AdapterLoadFailed as error:
        plain = any(phrase in error.message for phrase in NOT_SAFETENSORS)
        fault = Fault.NOT_SAFETENSORS if plain else Fault.BAD_HEADER
        raise failed(fault, _without(file.parent, error.message)) from None


def _refusal(file: pathlib.Path, error: AdapterLoadFailed) -> FetchFailed:
    fault = FAULTS.get(error.details.get("fault"), Fault.UNKNOWN_KEYS)
    return failed(fault, _without(file.parent, error.message))


def _without(folder: pathlib.Path, message: str) -> str:
    """The sentence without the folder of the cache, which says nothing to its reader."""
    return message.replace(f"{folder}/", "")


def _starred(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))

"""A LoRA file, checked against the denoiser before one of its tensors is read.

The spellings of different trainers are `lora_keys`. Called by `adapters.AdapterStore`.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.lora.key_layouts import (
    ALPHA,
    UnknownKeys,
    refuse_other_kinds,
    to_diffusers,
    without_guidance,
)
from calotype.serving.engine.model.weight_files import (
    FLOAT_DTYPES,
    WeightHeader,
    read_header,
    read_tensors,
)

_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight$")

LinearShapes = Mapping[str, tuple[int, int]]
"""Module name of the denoiser to (out_features, in_features)."""


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What an adapter adds to one linear layer: ``up @ down``, any alpha already in ``up``.

    Attributes:
        down: A, [rank, in_features].
        up: B times alpha / rank, [out_features, rank].
    """

    down: torch.Tensor
    up: torch.Tensor


def linear_shapes(denoiser: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Every layer of a denoiser that a LoRA may name."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def read_lora(
    path: pathlib.Path, shapes: LinearShapes, *, max_rank: int, dtype: torch.dtype
) -> dict[str, LoraLayer]:
    """Reads a checked LoRA file: module name to its layer, on the CPU.

    Raises:
        AdapterLoadFailed: the file is pickled, truncated, of another model, of a rank above
            ``max_rank``, incomplete, or holds numbers that are not finite; one sentence naming
            the file and the fault.
    """
    header = read_header(path, AdapterLoadFailed)
    _check_header(header, shapes, max_rank)
    tensors = dict(read_tensors(header, set(header.tensors), torch.device("cpu")))
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _failed(path, f"{name} holds NaN or infinity")
    converted = _convert(path, tensors, shapes)
    scales = _scales(header, converted)
    pairs = _pairs(path, converted)
    _check_layers(path, pairs, shapes, max_rank)
    layers: dict[str, LoraLayer] = {}
    for module, (down, up) in pairs.items():
        # Contiguous copies: the file's memory map must not outlive an adapter that is replaced.
        layers[module] = LoraLayer(
            down.to(dtype, copy=True).contiguous(),
            (up.float() * scales.get(module, 1.0)).to(dtype).contiguous(),
        )
    return layers


def _check_header(header: WeightHeader, shapes: LinearShapes, max_rank: int) -> None:
    path = header.path
    if not header.tensors:
        raise _failed(path, "it holds no tensors")
    for name, info in header.tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            raise _failed(path, f"{name} is of type {info.dtype}, not a floating-point type")
    try:
        refuse_other_kinds(header.tensors)
    except UnknownKeys as fault:
        raise _failed(path, str(fault)) from fault
    # One number seen as a whole tensor: the converters may look at values, so meta tensors fail.
    one = torch.ones(())
    ghosts = {name: one.expand(info.shape) for name, info in header.tensors.items()}
    _check_layers(path, _pairs(path, _convert(path, ghosts, shapes)), shapes, max_rank)


def _check_layers(
    path: pathlib.Path,
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    shapes: LinearShapes,
    max_rank: int,
) -> None:
    for module, (down, up) in pairs.items():
        if module not in shapes:
            raise _failed(
                path, f"it was made for another model: the denoiser has no linear layer {module!r}"
            )
        rows, columns = shapes[module]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise _failed(
                path,
                f"its factors for {module} do not fit together: "
                f"lora_A is {list(down.shape)}, lora_B is {list(up.shape)}",
            )
        if (up.shape[0], down.shape[1]) != (rows, columns):
            raise _failed(
                path,
                f"it was made for another model: for {module} it has {up.shape[0]}x"
                f"{down.shape[1]}, but the denoiser's layer is {rows}x{columns}",
            )
        rank = down.shape[0]
        if not 1 <= rank <= max_rank:
            raise _failed(
                path, f"its rank is {rank} at {module}, but the highest allowed is {max_rank}"
            )


def _convert(
    path: pathlib.Path, tensors: Mapping[str, torch.Tensor], shapes: LinearShapes
) -> dict[str, torch.Tensor]:
    try:
        return without_guidance(to_diffusers(tensors), shapes)
    except UnknownKeys as fault:
        raise _failed(path, str(fault)) from fault


def _pairs(
    path: pathlib.Path, tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    factors: dict[str, dict[str, torch.Tensor]] = {}
    alphas: list[str] = []
    for name, tensor in tensors.items():
        found = _FACTOR.match(name)
        if found is not None:
            factors.setdefault(found[1], {})[found[2]] = tensor
        elif (alpha := ALPHA.match(name)) is not None:
            alphas.append(alpha[1])
            if tensor.numel() != 1:
                raise _failed(path, f"{name} must be one number")
        else:
            raise _failed(path, f"it holds the unknown key {name!r}")
    if not factors:
        raise _failed(path, "it holds no lora_A and lora_B weights")
    for module, found_factors in factors.items():
        for letter in "AB":
            if letter not in found_factors:
                raise _failed(path, f"{module}.lora_{letter}.weight is missing")
    for module in alphas:
        if module not in factors:
            raise _failed(path, f"{module}.alpha belongs to no weights")
    return {module: (pair["A"], pair["B"]) for module, pair in factors.items()}


def _scales(header: WeightHeader, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """alpha / rank of each module that has an alpha: from its own key, or PEFT's metadata."""
    scales: dict[str, float] = {}
    config = _peft_config(header)
    for name, tensor in tensors.items():
        found = _FACTOR.match(name)
        if found is None or found[2] != "A":
            continue
        module, rank = found[1], int(tensor.shape[0])
        alpha: float | None = None
        if f"{module}.alpha" in tensors:
            alpha = float(tensors[f"{module}.alpha"])
        elif "lora_alpha" in config:
            alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
        if alpha is not None:
            root = config.get("use_rslora") is True
            scales[module] = alpha / (rank**0.5 if root else rank)
    return scales


def _peft_config(header: WeightHeader) -> JsonObject:
    """PEFT's LoraConfig as diffusers' save_lora_weights writes it into the file's metadata."""
    raw = header.metadata.get("lora_adapter_metadata")
    if raw is None:
        return {}
    try:
        content = json.loads(raw)
        found = {
            str(key).removeprefix("transformer."): value
            for key, value in content.items()
            if str(key).startswith("transformer.")
        }
        if "lora_alpha" in found:
            float(found["lora_alpha"])
    except (ValueError, TypeError, AttributeError) as fault:
        raise _failed(header.path, f"its lora_adapter_metadata is damaged ({fault})") from fault
    if found.get("use_dora"):
        raise _failed(header.path, "it is a DoRA adapter, which is not supported")
    return found


def _by_pattern(pattern: object, module: str, default: Any) -> Any:
    # PEFT reads a key as a regular expression over the end of a module's name, and writes plain
    # names. A stranger's file is read as plain names alone.
    if isinstance(pattern, dict):
        for key, value in pattern.items():
            if module == key or module.endswith(f".{key}"):
                return value
    return default


def _failed(path: pathlib.Path, fault: str) -> AdapterLoadFailed:
    return AdapterLoadFailed(f"{path} cannot be used as an adapter: {fault}.", param=str(path))

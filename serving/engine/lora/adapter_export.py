"""Adapter files in the spelling of another tool, with the same effect to the last bit.

What a conversion multiplies (alpha over rank, products of factors) is written in float32 where the
file's own type would round it. A file is complete under its name, or not there.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Literal

import torch

from calotype.serving.core.errors import AdapterLoadFailed, InvalidRequest
from calotype.serving.engine.lora.key_layouts import read_keys
from calotype.serving.engine.lora.layer_names import HALVES_SWAPPED, Target, bfl_layer
from calotype.serving.engine.lora.layer_plan import plan_layers
from calotype.serving.engine.lora.lora_file import read_layers
from calotype.serving.engine.lora.low_rank import LoraLayer, Magnitude
from calotype.serving.engine.model.weight_files import DTYPE_NAMES, tensor_bytes
from calotype.serving.engine.sizing.weight_header import TensorInfo, file_digest, read_header
from calotype.serving.engine.sizing.weight_writer import write_weights

ExportLayout = Literal["diffusers", "comfy", "kohya"]
_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
_OF_LAYOUT = ("lora_adapter_metadata", "ss_network_", "ss_lokr_factor", "sshs_", "format",
              "modelspec.hash")  # fmt: skip
"""Metadata that a conversion makes untrue."""


def convert_adapter(
    source: pathlib.Path, target: pathlib.Path, to: ExportLayout, *, max_rank: int
) -> str:
    """Writes an adapter in another layout; returns the sha256 of the result.

    Raises:
        AdapterLoadFailed: the source is no adapter, or more than ``max_rank`` ranks are needed.
        InvalidRequest: the layout has no form for it.
        StorageFailed: the disk is full or read-only; what was under the name stays.
    """
    header = read_header(source, AdapterLoadFailed)
    keys = read_keys(header)
    layers: dict[str, LoraLayer] = {}
    for _, parts in read_layers(header, plan_layers(header, keys), max_rank):
        layers |= parts
    tensors = export_tensors(layers, to, str(source))
    kept = {k: v for k, v in header.metadata.items() if not k.startswith(_OF_LAYOUT)}
    origin = f"{keys.layout} {file_digest(source)}"
    types = {info.dtype for info in header.tensors.values()} & _DTYPES.keys()
    dtype = _DTYPES[types.pop()] if len(types) == 1 else torch.bfloat16
    return write_adapter(
        target, _narrowed(tensors, dtype), kept | {"calotype.converted_from": origin}
    )


def export_tensors(
    layers: Mapping[str, LoraLayer], to: ExportLayout, name: str
) -> dict[str, torch.Tensor]:
    """Keys and tensors of a file, float32.

    Args:
        layers: under diffusers' names, with scales in their factors.
        name: of the adapter, for messages.

    Raises:
        InvalidRequest: magnitudes that the layout cannot express.
    """
    found: dict[str, torch.Tensor] = {}
    if to == "diffusers":
        for module, layer in layers.items():
            found[f"transformer.{module}.lora_A.weight"] = layer.down
            found[f"transformer.{module}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                if not layer.magnitude.per_row:
                    raise _no_form(
                        name, module, "diffusers knows magnitudes of rows only, these are of "
                        "columns; convert it --to kohya or comfy",
                    )  # fmt: skip
                found[f"transformer.{module}.lora_magnitude_vector"] = layer.magnitude.values
        return found
    for bfl, target in dict(bfl_layer(module) for module in layers).items():
        layer = _joined(layers, target, name)
        if target.modules == (HALVES_SWAPPED,):
            layer = _swapped(layer)
        prefix = f"lora_unet_{bfl.replace('.', '_')}" if to == "kohya" else f"diffusion_model.{bfl}"
        down, up = ("lora_down", "lora_up") if to == "kohya" else ("lora_A", "lora_B")
        found[f"{prefix}.{down}.weight"] = layer.down
        found[f"{prefix}.{up}.weight"] = layer.up
        if to == "kohya":
            found[f"{prefix}.alpha"] = torch.tensor(float(layer.rank))
        if layer.magnitude is not None:
            values, per_row = layer.magnitude.values, layer.magnitude.per_row
            found[f"{prefix}.dora_scale"] = values[:, None] if per_row else values[None]
    return found


def write_adapter(
    path: pathlib.Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str:
    """Writes a safetensors file in one step, and returns its sha256.

    Raises:
        StorageFailed: the disk is full or read-only; what was under the name stays.
    """
    infos = {
        key: TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for key, tensor in tensors.items()
    }
    return write_weights(
        path, infos, lambda key: tensor_bytes(tensors[key]), {"format": "pt", **metadata}
    )


def _joined(layers: Mapping[str, LoraLayer], target: Target, name: str) -> LoraLayer:
    """The parts of a joint layer as one; parts that are missing change nothing."""
    parts = [layers.get(module) for module in target.modules]
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    rows = {part.up.shape[0] for part in present}.pop()
    first = present[0].down
    if all(torch.equal(part.down, first) for part in present[1:]):
        zeros = first.new_zeros(rows, len(first))
        up = torch.cat([zeros if part is None else part.up for part in parts])
        down = first
    else:
        down = torch.cat([part.down for part in present])
        blocks = [first.new_zeros(rows, 0) if part is None else part.up for part in parts]
        up = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    magnitude = _joined_magnitude(parts, target, name)
    return LoraLayer(down, up, magnitude)


def _joined_magnitude(parts: list[LoraLayer | None], target: Target, name: str) -> Magnitude | None:
    magnitudes = [None if part is None else part.magnitude for part in parts]
    if all(magnitude is None for magnitude in magnitudes):
        return None
    known = [magnitude for magnitude in magnitudes if magnitude is not None]
    if len(known) == len(parts) and all(magnitude.per_row for magnitude in known):
        return Magnitude(torch.cat([m.values for m in known]), True, target.modules)
    if len(known) == len(parts) and all(m.joint == target.modules for m in known):
        return known[0]
    raise _no_form(
        name, target.modules[0], "query, key and value are one layer there, and their magnitudes "
        "are not of one layer here; keep diffusers' layout",
    )  # fmt: skip


def _swapped(layer: LoraLayer) -> LoraLayer:
    magnitude = layer.magnitude
    if magnitude is not None and magnitude.per_row:
        turned = magnitude.values.roll(len(magnitude.values) // 2, 0)
        magnitude = Magnitude(turned, True, magnitude.joint)
    return LoraLayer(layer.down, layer.up.roll(len(layer.up) // 2, 0), magnitude)


def _narrowed(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """In the given type if that rounds nothing, else as they are."""
    narrow = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    same = all(torch.equal(narrow[key].float(), tensor) for key, tensor in tensors.items())
    return narrow if same else dict(tensors)


def _no_form(name: str, module: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name} cannot be written in that layout: at {module}, {why}.", param="to"
    )

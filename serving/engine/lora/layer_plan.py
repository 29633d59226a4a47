"""What a file's layers are, from its header and its few single numbers. Imports no torch.

Shapes, ranks and scales are known and checked before a weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.lora.adapter_fault import AdapterFault, refused
from calotype.serving.engine.lora.key_layouts import AdapterKeys, Kind, LayerKeys
from calotype.serving.engine.sizing.weight_header import WeightHeader, read_number

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer of a file, before its weights are read.

    Attributes:
        rows, columns: of the layer, all parts of a joint one together.
        rank: ranks of the change at most; exact for a LoRA.
        alpha: as the file has it; None if nowhere, which every trainer reads as the rank.
        scale: of the change, alpha over rank in the sense of its kind.
        per_row: what the norms of a DoRA are of; None if it is none.
    """

    layer: LayerKeys
    rows: int
    columns: int
    rank: int
    alpha: float | None
    scale: float
    per_row: bool | None


def plan_layers(header: WeightHeader, keys: AdapterKeys) -> list[LayerPlan]:
    """Raises:
    AdapterLoadFailed: types or shapes are not those of an adapter; names file and key.
    """
    config = _peft_config(header)
    roots = _uses_roots(header, config)
    plans = [_plan(header, layer, keys.musubi, config, roots) for layer in keys.layers]
    if config.get("use_dora") and all(plan.per_row is None for plan in plans):
        raise refused(
            header.path,
            AdapterFault.KEY_MISSING,
            "its metadata says that it is a DoRA adapter, but it holds no magnitudes; save it "
            "with PEFT's lora_magnitude_vector weights",
            "lora_adapter_metadata",
        )
    return plans


def _plan(
    header: WeightHeader, layer: LayerKeys, musubi: bool, config: JsonObject, roots: bool
) -> LayerPlan:
    for factor, key in layer.keys.items():
        dtype = header.tensors[key].dtype
        if factor != "alpha" and dtype not in FLOAT_DTYPES:
            raise refused(
                header.path,
                AdapterFault.WRONG_DTYPE,
                f"{key} is of type {dtype}; an adapter's weights are "
                f"{', '.join(sorted(FLOAT_DTYPES))}: save it as one of them",
                key,
            )
    shapes = {factor: header.tensors[key].shape for factor, key in layer.keys.items()}
    first = layer.first_key
    try:
        rows, columns, rank = _SIZES[layer.kind](shapes)
    except ValueError as fault:
        raise refused(
            header.path,
            AdapterFault.BAD_WEIGHTS,
            f"its factors for {layer.name} do not fit together: {fault} (from {first!r}); "
            "export the file again",
            first,
        ) from None
    parts = len(layer.target.modules)
    if rows % parts:
        raise refused(
            header.path,
            AdapterFault.WRONG_BASE,
            f"it was made for another model: {layer.name} has {rows} rows, which are not "
            f"{parts} equal parts (from {first!r})",
            first,
        )
    alpha = _alpha(header, layer, config)
    per_row = _norms(header, layer, rows, columns)
    return LayerPlan(
        layer, rows, columns, rank, alpha, _scale(layer, shapes, alpha, musubi, roots), per_row
    )


def _lora_sizes(shapes: Shapes) -> tuple[int, int, int]:
    down, up = shapes["down"], shapes["up"]
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise ValueError(f"lora_A is {list(down)}, lora_B is {list(up)}")
    return up[0], down[1], down[0]


def _lokr_sizes(shapes: Shapes) -> tuple[int, int, int]:
    rows, columns, rank = 1, 1, 1
    for side in ("lokr_w1", "lokr_w2"):
        whole = shapes.get(side)
        a, b = (whole, whole) if whole is not None else (shapes[f"{side}_a"], shapes[f"{side}_b"])
        if len(a) != 2 or len(b) != 2 or (whole is None and a[1] != b[0]):
            raise ValueError(f"{side} is {list(a)}" + (f" by {list(b)}" if whole is None else ""))
        rows, columns = rows * a[0], columns * b[1]
        rank *= min(a[0], b[1], *(() if whole is not None else (a[1],)))
    return rows, columns, rank


def _loha_sizes(shapes: Shapes) -> tuple[int, int, int]:
    sides: list[Shape] = []
    rank = 1
    for side in ("hada_w1", "hada_w2"):
        a, b = shapes[f"{side}_a"], shapes[f"{side}_b"]
        if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            raise ValueError(f"{side}_a is {list(a)}, {side}_b is {list(b)}")
        sides.append((a[0], b[1]))
        rank *= b[0]
    if sides[0] != sides[1]:
        raise ValueError(f"hada_w1 makes {list(sides[0])}, hada_w2 makes {list(sides[1])}")
    rows, columns = sides[0]
    return rows, columns, min(rank, rows, columns)


_SIZES: Mapping[Kind, Callable[[Shapes], tuple[int, int, int]]] = {
    Kind.LORA: _lora_sizes,
    Kind.LOKR: _lokr_sizes,
    Kind.LOHA: _loha_sizes,
}


def _scale(
    layer: LayerKeys, shapes: Shapes, alpha: float | None, musubi: bool, roots: bool
) -> float:
    """Alpha over rank in the sense of the layer's kind.

    With two whole factors of a LoKr, LyCORIS and ai-toolkit write an alpha that counts for nothing,
    and musubi-tuner divides it by the longer side of the second.
    """
    if alpha is None:
        return 1.0
    ends = ("lokr_w2_b", "lokr_w1_b") if layer.kind is Kind.LOKR else ("down", "hada_w1_b")
    rank = next((shapes[end][0] for end in ends if end in shapes), None)
    if rank is None:
        return alpha / max(shapes["lokr_w2"]) if musubi else 1.0
    return alpha / (math.sqrt(rank) if roots else rank)


def _alpha(header: WeightHeader, layer: LayerKeys, config: JsonObject) -> float | None:
    """From its own key, else from PEFT's metadata."""
    key = layer.keys.get("alpha")
    if key is not None:
        alpha = read_number(header, key)
        if alpha is None:
            raise refused(header.path, AdapterFault.BAD_WEIGHTS, f"{key} must be one number", key)
    elif "lora_alpha" in config and layer.kind is Kind.LORA:
        key = "lora_adapter_metadata"
        named = _by_ending(config["alpha_pattern"], layer.target.modules[0])
        alpha = float(config["lora_alpha"] if named is None else named)
    else:
        return None
    if not math.isfinite(alpha) or alpha <= 0:
        what = (
            "NaN or infinity" if not math.isfinite(alpha) else f"{alpha:g}, which changes nothing"
        )
        raise refused(
            header.path,
            AdapterFault.BAD_WEIGHTS,
            f"the alpha of {layer.name} ({key!r}) is {what}; write a number above 0",
            key,
        )
    return alpha


def _norms(header: WeightHeader, layer: LayerKeys, rows: int, columns: int) -> bool | None:
    key = layer.keys.get("magnitude")
    if key is None:
        return None
    shape = header.tensors[key].shape
    if shape in ((rows,), (rows, 1)):
        return True
    if shape == (1, columns):
        return False
    raise refused(
        header.path,
        AdapterFault.BAD_WEIGHTS,
        f"{key} is {list(shape)}; the magnitudes of a {rows}x{columns} layer are [{rows}], "
        f"[{rows}, 1] or [1, {columns}]",
        key,
    )


def _uses_roots(header: WeightHeader, config: JsonObject) -> bool:
    """Whether alpha is divided by the root of the rank (rsLoRA)."""
    if config.get("use_rslora") is True:
        return True
    try:
        arguments = json.loads(header.metadata.get("ss_network_args", "{}"))
        return str(arguments.get("rs_lora", arguments.get("use_rslora"))).lower() == "true"
    except (ValueError, AttributeError, RecursionError):
        return False


def _peft_config(header: WeightHeader) -> JsonObject:
    """PEFT's LoraConfig as diffusers' save_lora_weights writes it into the file's metadata."""
    raw = header.metadata.get("lora_adapter_metadata")
    if raw is None:
        return {"alpha_pattern": {}}
    try:
        content = json.loads(raw)
        found = {
            str(key).removeprefix("transformer."): value
            for key, value in content.items()
            if str(key).startswith("transformer.")
        }
        if "lora_alpha" in found:
            float(found["lora_alpha"])
        # PEFT reads a name as a regular expression over the end of a module's name, and writes
        # plain names. A stranger's file is read as plain names alone; the first that fits counts.
        given = found.get("alpha_pattern") or {}
        found["alpha_pattern"] = {
            str(name): (place, float(alpha)) for place, (name, alpha) in enumerate(given.items())
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as fault:
        raise _damaged(header, fault) from fault
    return found


def _damaged(header: WeightHeader, fault: Exception) -> AdapterLoadFailed:
    return refused(
        header.path,
        AdapterFault.BAD_WEIGHTS,
        f"its lora_adapter_metadata is damaged ({fault}); save it again with diffusers",
        "lora_adapter_metadata",
    )


def _by_ending(named: Mapping[str, tuple[int, float]], module: str) -> float | None:
    """The number of the first name that a module's own is or ends with."""
    parts = module.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts)))
    found = min((named[ending] for ending in endings if ending in named), default=None)
    return None if found is None else found[1]

"""An adapter file, checked against the denoiser before one of its tensors is read.

The spellings of trainers are `key_layouts`, sizes and scales `layer_plan`; here the weights become
`LoraLayer`s under diffusers' names. Called by `adapter_store.AdapterStore`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.engine.lora.adapter_fault import AdapterFault, refused
from calotype.serving.engine.lora.key_layouts import Kind, Layout, read_keys
from calotype.serving.engine.lora.layer_plan import LayerPlan, plan_layers
from calotype.serving.engine.lora.loha import loha_factors
from calotype.serving.engine.lora.lokr import lokr_factors
from calotype.serving.engine.lora.low_rank import EXACT, LoraLayer, Magnitude
from calotype.serving.engine.lora.model_fit import (
    WHERE_MAX_RANK,
    Coverage,
    LinearShapes,
    check_fit,
    coverage,
    other_model,
)
from calotype.serving.engine.model.weight_files import read_tensors
from calotype.serving.engine.sizing.weight_header import WeightHeader, read_header


@dataclass(frozen=True, slots=True)
class LoraFile:
    """An adapter as its file has it.

    Attributes:
        layers: module of the denoiser -> what it adds there, on the CPU.
        coverage: how much of the model that is.
    """

    layers: dict[str, LoraLayer]
    coverage: Coverage
    layout: Layout


def linear_shapes(denoiser: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Every layer of a denoiser that a LoRA may name."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def read_lora(
    path: pathlib.Path, shapes: LinearShapes, *, max_rank: int, dtype: torch.dtype
) -> LoraFile:
    """Reads a checked adapter file.

    Raises:
        AdapterLoadFailed: the file is pickled, truncated, of another model, of a rank above
            ``max_rank``, incomplete, or holds numbers that are not finite; one sentence naming
            the file, the key and what to do. ``details["fault"]`` is an `AdapterFault`.
    """
    header = read_header(path, AdapterLoadFailed)
    keys = read_keys(header)
    plans = plan_layers(header, keys)
    for plan in plans:
        check_fit(path, plan, shapes, max_rank)
    layers: dict[str, LoraLayer] = {}
    for plan, parts in read_layers(header, plans, max_rank):
        for module, layer in parts.items():
            if module in shapes:
                # Contiguous copies: the file's memory map must not outlive a replaced adapter.
                layers[module] = layer.to(torch.device("cpu"), dtype)
            elif bool(layer.up.any()) and bool(layer.down.any()):
                raise other_model(path, plan, f"the denoiser has no linear layer {module!r}")
    return LoraFile(layers, coverage(layers, shapes), keys.layout)


def read_layers(
    header: WeightHeader, plans: list[LayerPlan], max_rank: int
) -> Iterator[tuple[LayerPlan, dict[str, LoraLayer]]]:
    """The layers of a file one after the other, each as its parts in diffusers' naming, float32.

    Raises:
        AdapterLoadFailed: a number is not finite, or a product has more than ``max_rank`` ranks.
    """
    names = {key for plan in plans for factor, key in plan.layer.keys.items() if factor != "alpha"}
    stored = dict(read_tensors(header, names, torch.device("cpu")))
    for plan in plans:
        tensors: dict[str, torch.Tensor] = {}
        for factor, key in plan.layer.keys.items():
            if factor == "alpha":
                continue
            tensors[factor] = stored.pop(key).to(torch.float32, copy=True)
            if not bool(torch.isfinite(tensors[factor]).all()):
                raise refused(
                    header.path,
                    AdapterFault.BAD_WEIGHTS,
                    f"{key} holds NaN or infinity; use an earlier checkpoint of its training",
                    key,
                )
        yield plan, _parts(plan, *_factors(header.path, plan, tensors, max_rank), tensors)


def _factors(
    path: pathlib.Path, plan: LayerPlan, tensors: Mapping[str, torch.Tensor], max_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down) of the whole layer, its scale in ``up``."""
    if plan.layer.kind is Kind.LORA:
        return tensors["up"] * plan.scale, tensors["down"]
    make = lokr_factors if plan.layer.kind is Kind.LOKR else loha_factors
    found = make(tensors, max_rank)
    if found.loss > EXACT:
        key = plan.layer.first_key
        raise refused(
            path,
            AdapterFault.RANK_TOO_HIGH,
            f"as a LoRA, {plan.layer.name} ({key!r}) needs rank {found.rank_needed}, and its first "
            f"{max_rank} leave out {found.loss:.2%} of what it changes. Exact or not at all: "
            f"allow the rank ({WHERE_MAX_RANK}), or train it with a smaller one",
            key,
        )
    return found.up * plan.scale, found.down


def _parts(
    plan: LayerPlan, up: torch.Tensor, down: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> dict[str, LoraLayer]:
    """The layer as one of diffusers' layers for each of its equal parts."""
    modules, target = plan.layer.target.modules, plan.layer.target
    values = tensors.get("magnitude")
    values = None if values is None else values.flatten()
    if target.halves_swapped:
        up = up.roll(len(up) // 2, 0)
        if values is not None and plan.per_row:
            values = values.roll(len(values) // 2, 0)
    ups, downs = list(up.chunk(len(modules))), [down] * len(modules)
    if len(modules) > 1 and (ranks := _own_ranks(ups, len(down))):
        ups = [up[:, span].contiguous() for up, span in zip(ups, ranks, strict=True)]
        downs = [down[span] for span in ranks]
    found: dict[str, LoraLayer] = {}
    for place, module in enumerate(modules):
        magnitude = None
        if values is not None and plan.per_row is not None:
            own = values.chunk(len(modules))[place] if plan.per_row else values
            magnitude = Magnitude(own, plan.per_row, modules)
        found[module] = LoraLayer(downs[place], ups[place].contiguous(), magnitude)
    return found


def _own_ranks(ups: list[torch.Tensor], rank: int) -> list[slice] | None:
    """Where each part's ranks are, if each uses an equal share of them and no other."""
    share, rest = divmod(rank, len(ups))
    if rest:
        return None
    spans = [slice(i * share, (i + 1) * share) for i in range(len(ups))]
    for up, span in zip(ups, spans, strict=True):
        if bool(up[:, : span.start].any()) or bool(up[:, span.stop :].any()):
            return None
    return spans

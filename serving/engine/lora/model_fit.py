"""Whether an adapter's layers are those of a model, and how much of the model they change.

Decided by shapes; imports no torch.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.engine.lora.adapter_fault import AdapterFault, refused
from calotype.serving.engine.lora.key_layouts import Kind
from calotype.serving.engine.lora.layer_names import GUIDANCE, block_of
from calotype.serving.engine.lora.layer_plan import LayerPlan
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.linear_layers import linear_layers
from calotype.serving.engine.sizing.model_sizes import KNOWN_MODELS

MAX_RANK = 256
"""Highest rank where nobody says another one."""
WHERE_MAX_RANK = "spec.adapters.maxRank of the ImageModel"

LinearShapes = Mapping[str, tuple[int, int]]
"""Module name of the denoiser to (out_features, in_features)."""


@dataclass(frozen=True, slots=True)
class BlockCoverage:
    """Linear layers of one block (``transformer_blocks.3``): those that are changed, and all."""

    block: str
    matched: int
    total: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of a model's linear layers an adapter changes.

    Nothing of a file is ever left over: a tensor that changes no layer is an error.
    """

    matched: int
    total: int
    blocks: tuple[BlockCoverage, ...]

    def __str__(self) -> str:
        return f"{self.matched} of {self.total} linear layers"


def coverage(modules: Collection[str], model: Collection[str]) -> Coverage:
    """Args:
    modules: layers that the adapter changes, all of them among the model's.
    model: all linear layers of the model, in its order.
    """
    counts: dict[str, list[int]] = {}
    for module in model:
        count = counts.setdefault(block_of(module), [0, 0])
        count[0] += module in modules
        count[1] += 1
    blocks = tuple(BlockCoverage(block, *count) for block, count in counts.items())
    return Coverage(sum(b.matched for b in blocks), sum(b.total for b in blocks), blocks)


def check_fit(path: pathlib.Path, plan: LayerPlan, shapes: LinearShapes, max_rank: int) -> None:
    """Raises:
    AdapterLoadFailed: the model has no such layer, one of another size, or takes no such rank.
    """
    modules = plan.layer.target.modules
    for module in modules:
        if module not in shapes:
            # Some trainers always write these; whether they do anything is seen in the weights.
            if module.startswith(GUIDANCE):
                continue
            raise other_model(path, plan, f"the denoiser has no linear layer {module!r}")
        rows, columns = shapes[module]
        if (plan.rows // len(modules), plan.columns) != (rows, columns):
            raise other_model(
                path,
                plan,
                f"for {module} it has {plan.rows // len(modules)}x{plan.columns}, but the "
                f"denoiser's layer is {rows}x{columns}",
            )
    if plan.rank < 1 or (plan.layer.kind is Kind.LORA and plan.rank > max_rank):
        key = plan.layer.first_key
        raise refused(
            path,
            AdapterFault.RANK_TOO_HIGH,
            f"its rank is {plan.rank} at {plan.layer.name} ({key!r}), but the highest allowed is "
            f"{max_rank}: raise {WHERE_MAX_RANK}, or resize the adapter",
            key,
        )


def other_model(path: pathlib.Path, plan: LayerPlan, why: str) -> AdapterLoadFailed:
    """The error about a layer that the model does not have."""
    base = guess_base([plan])
    known = "" if base is None else f" (its width is that of {base})"
    key = plan.layer.first_key
    return refused(
        path,
        AdapterFault.WRONG_BASE,
        f"it was made for another model{known}: {why} (key {key!r}). Use it with the model that "
        "it was trained on",
        key,
    )


def guess_base(plans: Sequence[LayerPlan]) -> str | None:
    """The published FLUX.2 that has all of these layers; None if none has, or several have."""
    found = [name for name in KNOWN_MODELS if _has_all(name, plans)]
    return found[0] if len(found) == 1 else None


def _has_all(name: str, plans: Sequence[LayerPlan]) -> bool:
    shapes = linear_layers(TransformerConfig.from_json(KNOWN_MODELS[name].denoiser))
    return all(
        shapes.get(module) == (plan.rows // len(plan.layer.target.modules), plan.columns)
        for plan in plans
        for module in plan.layer.target.modules
        if not module.startswith(GUIDANCE)
    )

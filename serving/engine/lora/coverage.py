"""How much of a model an adapter changes. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from calotype.serving.engine.lora.layer_names import block_of


@dataclass(frozen=True, slots=True)
class BlockCoverage:
    """Linear layers of one block (``transformer_blocks.3``): those that are changed, and all."""

    block: str
    matched: int
    total: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of a file's layers in a model.

    Nothing of a file is ever left over: a tensor that changes no layer is an error. ``unchanged``
    layers are therefore the model's, not the file's.
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

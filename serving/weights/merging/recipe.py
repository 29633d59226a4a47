"""What is merged with what, and how. Imports no torch."""

from __future__ import annotations

import fnmatch
import pathlib
from dataclasses import dataclass, field
from typing import Literal, get_args

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject

ModelMethod = Literal["linear", "slerp", "task", "ties", "dare"]
AdapterMethod = Literal["concat", "svd"]
MODEL_METHODS: tuple[ModelMethod, ...] = get_args(ModelMethod)
ADAPTER_METHODS: tuple[AdapterMethod, ...] = get_args(AdapterMethod)
NEED_BASE = ("task", "ties", "dare")


@dataclass(frozen=True, slots=True)
class MergeInput:
    """One model folder or adapter file.

    Attributes:
        weight: its share; where ``blocks`` has a pattern for a tensor's name, that one's instead.
        blocks: pattern of names, such as ``transformer_blocks.*`` -> weight; the first that fits.
        licence: of its weights, where neither its README nor its metadata say so.
    """

    path: pathlib.Path
    weight: float = 1.0
    blocks: dict[str, float] = field(default_factory=dict)
    licence: str | None = None

    def weight_of(self, name: str) -> float:
        """Of one tensor, or of one layer of an adapter."""
        for pattern, weight in self.blocks.items():
            if fnmatch.fnmatchcase(name, pattern):
                return weight
        return self.weight


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """A merge of models (``linear`` to ``dare``) or of adapters (``concat``, ``svd``).

    Attributes:
        base: the model that the differences of ``task``, ``ties`` and ``dare`` are from.
        density: share of each difference that is kept (``ties``: the largest, ``dare``: by lot).
        rank: of the result of ``svd``.
        seed: of the lots of ``dare``.
        commercial: the result is meant for commercial use, which its licence must allow.
        licence: of the result, where the merger has it from the owners; None derives it.
    """

    method: ModelMethod | AdapterMethod
    inputs: tuple[MergeInput, ...]
    base: MergeInput | None = None
    density: float = 0.5
    rank: int = 32
    seed: int = 0
    commercial: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            raise InvalidRequest(problem[1], param=problem[0])

    @property
    def of_adapters(self) -> bool:
        return self.method in ADAPTER_METHODS

    def _problem(self) -> tuple[str, str] | None:
        count = len(self.inputs)
        if count < 2 and not (count == 1 and self.base is not None):
            return "inputs", f"A merge needs two inputs or more, or one and a base; got {count}."
        if self.method == "slerp" and count != 2:
            return "inputs", f"slerp is between two models; got {count}: use linear."
        needs = self.method in NEED_BASE
        if needs and self.base is None:
            return "base", f"{self.method} adds differences from a base: name it with --base."
        if not needs and self.base is not None:
            return "base", f"{self.method} knows no base: remove it, or use task, ties or dare."
        if not 0 < self.density <= 1:
            return "density", f"density must be above 0 and at most 1, got {self.density:g}."
        if self.rank < 1:
            return "rank", f"rank must be at least 1, got {self.rank}."
        if self.method in ("linear", "slerp"):
            sums = sum(one.weight for one in self.inputs)
            if sums <= 0 or any(one.weight < 0 for one in self.inputs):
                return "weight", f"the weights of {self.method} must be 0 or more, and not all 0."
        return None

    def to_json(self, digests: dict[str, str]) -> JsonObject:
        """The recipe as it is kept with its result.

        Args:
            digests: path of an input -> digest of its weights.
        """

        def named(one: MergeInput) -> JsonObject:
            return {
                "name": one.path.name,
                "digest": digests[str(one.path)],
                "weight": one.weight,
                **({"blocks": one.blocks} if one.blocks else {}),
            }

        found: JsonObject = {
            "method": self.method,
            "inputs": [named(one) for one in self.inputs],
        }
        if self.base is not None:
            found["base"] = named(self.base)
        if self.method in ("ties", "dare"):
            found["density"] = self.density
        if self.method == "dare":
            found["seed"] = self.seed
        if self.method == "svd":
            found["rank"] = self.rank
        return found

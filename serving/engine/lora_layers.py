"""The sum that adapters add to a batch of rows.

Weights are never merged into the model. A hook on each targeted linear layer adds
``sum_k w[row, k] * B_k(A_k x[row])``, so one step may hold rows with different stacks of adapters.
For the adapters of a batch all A's lie above each other in one matrix and all B's beside each
other, which makes two matrix products per layer, however many rows and adapters there are; rows
without adapters are left out. Paper: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calotype.serving.engine.lora_file import LoraLayer

_PLANS_KEPT = 16


class Adapter:
    """One loaded revision of an adapter. Rows hold it, so it outlives its place in the store."""

    __slots__ = ("digest", "layers", "name", "size")

    def __init__(self, name: str, layers: dict[str, LoraLayer], digest: str = "") -> None:
        self.name = name
        self.digest = digest
        self.layers = layers
        self.size = sum(
            t.numel() * t.element_size() for la in layers.values() for t in (la.down, la.up)
        )


Stack = tuple[tuple[Adapter, float], ...]
"""The adapters of one row, each with its scale; scales of 0 are left out."""


@dataclass(slots=True)
class _Layer:
    """Adapters of a batch at one linear layer.

    Attributes:
        down: [in_features, ranks of all adapters].
        up: [ranks, out_features].
        weights: [rows that have adapters, ranks], each row's scales.
    """

    down: torch.Tensor
    up: torch.Tensor
    weights: torch.Tensor


@dataclass(slots=True)
class _Plan:
    rows: torch.Tensor | None
    """Indices of the rows that have adapters; None means all."""
    layers: dict[str, _Layer]
    adapters: tuple[Adapter, ...]
    """Keeps them alive: the plan is found again by their identity."""


class LoraLayers:
    """Hooks on a denoiser's linear layers that add the adapters of the current batch."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self._modules = {
            name: module
            for name, module in denoiser.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self._hooks: dict[str, Any] = {}
        self._active: _Plan | None = None
        self._plans: OrderedDict[tuple[object, ...], _Plan] = OrderedDict()
        # Adapters are forgotten by other threads than the one that draws.
        self._lock = threading.Lock()

    @contextmanager
    def applied(self, stacks: Sequence[Stack]) -> Iterator[None]:
        """Within, the denoiser draws row i with ``stacks[i]``. One thread at a time.

        May be nested, for a part of the rows.
        """
        before = self._active
        self._active = self._plan(stacks) if any(stacks) else None
        try:
            yield
        finally:
            self._active = before

    def _plan(self, stacks: Sequence[Stack]) -> _Plan:
        key = tuple(tuple((id(adapter), scale) for adapter, scale in s) for s in stacks)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = self._build(stacks)
                if len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return plan

    def _build(self, stacks: Sequence[Stack]) -> _Plan:
        rows = [i for i, stack in enumerate(stacks) if stack]
        adapters = tuple(dict.fromkeys(adapter for stack in stacks for adapter, _ in stack))
        scales = [dict[Adapter, float]() for _ in rows]
        for place, i in enumerate(rows):
            for adapter, scale in stacks[i]:
                # The same adapter twice in one stack adds up, as it would if applied twice.
                scales[place][adapter] = scales[place].get(adapter, 0.0) + scale
        layers: dict[str, _Layer] = {}
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
            here = [a for a in adapters if name in a.layers]
            device = self._modules[name].weight.device
            found = [a.layers[name] for a in here]
            weights = [
                [s.get(a, 0.0) for a in here for _ in range(a.layers[name].down.shape[0])]
                for s in scales
            ]
            layers[name] = _Layer(
                torch.cat([la.down.to(device) for la in found]).t().contiguous(),
                torch.cat([la.up.to(device) for la in found], dim=1).t().contiguous(),
                torch.tensor(weights, dtype=found[0].down.dtype, device=device),
            )
            if name not in self._hooks:
                self._hooks[name] = self._modules[name].register_forward_hook(self._hook(name))
        index = None
        if len(rows) < len(stacks):
            index = torch.tensor(rows, device=next(iter(self._modules.values())).weight.device)
        return _Plan(index, layers, adapters)

    def _hook(self, name: str) -> Any:
        def add(
            _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor | None:
            plan = self._active
            layer = None if plan is None else plan.layers.get(name)
            if plan is None or layer is None:
                return None
            given = inputs[0] if plan.rows is None else inputs[0].index_select(0, plan.rows)
            weights = layer.weights if given.ndim == 2 else layer.weights.unsqueeze(1)
            added = ((given.to(layer.down.dtype) @ layer.down) * weights) @ layer.up
            if plan.rows is None:
                return output + added.to(output.dtype)
            # index_add leaves the rows that have no adapter exactly as they are.
            return output.index_add(0, plan.rows, added.to(output.dtype))

        return add

    def forget(self, adapter: Adapter) -> None:
        """Drops plans of an adapter that was unloaded, so that its memory is freed."""
        with self._lock:
            for key in [k for k, plan in self._plans.items() if adapter in plan.adapters]:
                del self._plans[key]

    def remove(self) -> None:
        """Takes every hook off the denoiser."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._plans.clear()

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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from calotype.serving.engine.lora.low_rank import Gain, LoraLayer
from calotype.serving.engine.model.row_linear import by_row

_PLANS_KEPT = 64
_RANKS = 16
BANK_BYTES = 512 * 1024**2
"""Memory for the joined matrices of adapters that were used together."""


class Adapter:
    """One loaded revision of an adapter. Rows hold it, so it outlives its place in the store.

    Attributes:
        source: its file, and ``digest`` the sha256 of it.
        layers: module name -> its factors on the denoiser's device; None while they are not there.
        size: bytes of its factors.
    """

    __slots__ = ("digest", "layers", "name", "size", "source")

    def __init__(
        self, name: str, layers: dict[str, LoraLayer] | None, source: str = "", digest: str = ""
    ) -> None:
        self.name = name
        self.source, self.digest = source, digest
        self.layers = layers
        self.size = lora_bytes(layers or {})


def lora_bytes(layers: dict[str, LoraLayer]) -> int:
    """Bytes of an adapter's factors and gains."""
    gains = sum(la.gain.values.nbytes for la in layers.values() if la.gain is not None)
    return gains + sum(t.nbytes for la in layers.values() for t in (la.down, la.up))


Stack = tuple[tuple[Adapter, float], ...]
"""The adapters of one row, each with its scale; scales of 0 are left out."""


@dataclass(slots=True)
class _Joined:
    """Adapters at one linear layer.

    Attributes:
        down: [in_features, ranks of all adapters].
        up: [ranks, out_features].
        owner: [ranks], the place of the adapter that each rank belongs to.
        gains: of the DoRAs among them, each with the place of its adapter.
    """

    down: torch.Tensor
    up: torch.Tensor
    owner: torch.Tensor
    gains: tuple[tuple[int, Gain], ...] = ()

    def down_of(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.down

    def up_of(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.up


@dataclass(slots=True)
class _Bank:
    """Adapters that were used together, joined per layer."""

    adapters: tuple[Adapter, ...]
    layers: dict[str, _Joined]
    size: int


@dataclass(slots=True)
class _Plan:
    """What the rows of a batch add.

    Attributes:
        rows: indices of the rows that have adapters; None means all.
        scales: [rows that have adapters, adapters of the bank].
        weights: per layer, ``scales`` spread over the ranks; filled in as layers come by.
    """

    bank: _Bank
    rows: torch.Tensor | None
    scales: torch.Tensor
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def scale(self, place: int, dimensions: int) -> torch.Tensor:
        """Of one adapter, [rows, 1, ...]."""
        return self.scales[:, place].reshape(-1, *(1,) * (dimensions - 1))

    def weight(self, name: str, layer: _Joined) -> torch.Tensor:
        found = self.weights.get(name)
        if found is None:
            found = self.weights[name] = self.scales.index_select(1, layer.owner)
        return found


def _filled(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Its factors, with zeros up to a whole number of `_RANKS` ranks.

    Products of fewer columns are summed in another order, so an adapter alone and beside others
    would part in the last bit. A sum that is longer by zeros is the same.
    """
    missing = -len(layer.down) % _RANKS
    if not missing:
        return layer.down, layer.up
    return functional.pad(layer.down, (0, 0, 0, missing)), functional.pad(layer.up, (0, missing))


def _gained(
    module: torch.nn.Linear, gain: Gain, given: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """What DoRA adds besides its factors: see `dora`.

    Args:
        given: the rows' input of the layer, and ``output`` what the layer alone makes of it.
    """
    if gain.per_row:
        own = output if module.bias is None else output - module.bias
        return (own * gain.values).to(output.dtype)
    turned = (given * gain.values).to(given.dtype)
    return by_row(lambda x: functional.linear(x, module.weight), turned)


class LoraLayers:
    """Hooks on a denoiser's linear layers that add the adapters of the current batch."""

    def __init__(self, denoiser: torch.nn.Module, bank_bytes: int = BANK_BYTES) -> None:
        self._modules = {
            name: module
            for name, module in denoiser.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self._bank_bytes = bank_bytes
        self._hooks: dict[str, RemovableHandle] = {}
        self._active: _Plan | None = None
        self._banks: OrderedDict[tuple[int, ...], _Bank] = OrderedDict()
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

    def bank_bytes(self) -> int:
        """Memory of the joined matrices, besides the adapters themselves."""
        with self._lock:
            return sum(bank.size for bank in self._banks.values())

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
        used = {id(adapter): adapter for stack in stacks for adapter, _ in stack}
        # By name and contents: a sum of adapters has the same order in every process.
        order = sorted(used.values(), key=lambda adapter: (adapter.name, adapter.digest))
        bank = self._bank(tuple(order))
        places = {id(adapter): place for place, adapter in enumerate(bank.adapters)}
        rows = [i for i, stack in enumerate(stacks) if stack]
        scales = torch.zeros(len(rows), len(places))
        for place, i in enumerate(rows):
            for adapter, scale in stacks[i]:
                # The same adapter twice in one stack adds up, as it would if applied twice.
                scales[place, places[id(adapter)]] += scale
        any_layer = next(iter(bank.layers.values()))
        device, dtype = any_layer.down.device, any_layer.down.dtype
        index = None
        if len(rows) < len(stacks):
            index = torch.tensor(rows).to(device, non_blocking=True)
        return _Plan(bank, index, scales.to(device, dtype, non_blocking=True))

    def _bank(self, adapters: tuple[Adapter, ...]) -> _Bank:
        key = tuple(id(adapter) for adapter in adapters)
        bank = self._banks.get(key)
        if bank is None:
            bank = self._banks[key] = self._join(adapters)
            held = sum(b.size for b in self._banks.values())
            for old in list(self._banks)[:-1]:
                if held <= self._bank_bytes:
                    break
                held -= self._drop(old)
        self._banks.move_to_end(key)
        return bank

    def _drop(self, key: tuple[int, ...]) -> int:
        """Forgets a bank and the plans made of it; its bytes."""
        bank = self._banks.pop(key)
        for plan in [k for k, p in self._plans.items() if p.bank is bank]:
            del self._plans[plan]
        return bank.size

    def _join(self, adapters: tuple[Adapter, ...]) -> _Bank:
        layers: dict[str, _Joined] = {}
        size = 0
        factors = [adapter.layers or {} for adapter in adapters]
        for name in dict.fromkeys(name for layer in factors for name in layer):
            here = [(i, layer[name]) for i, layer in enumerate(factors) if name in layer]
            whole = [_filled(la) for _, la in here]
            downs, ups = [down for down, _ in whole], [up for _, up in whole]
            owner = [i for (i, _), down in zip(here, downs, strict=True) for _ in range(len(down))]
            joined = _Joined(
                # One adapter alone is used as it is, without a copy.
                (downs[0] if len(here) == 1 else torch.cat(downs)).t(),
                (ups[0] if len(here) == 1 else torch.cat(ups, dim=1)).t(),
                torch.tensor(owner).to(downs[0].device, non_blocking=True),
                tuple((i, la.gain) for i, la in here if la.gain is not None),
            )
            layers[name] = joined
            if len(here) > 1 or downs[0] is not here[0][1].down:
                size += joined.down.nbytes + joined.up.nbytes
            if name not in self._hooks:
                self._hooks[name] = self._modules[name].register_forward_hook(self._hook(name))
        return _Bank(adapters, layers, size)

    def _hook(self, name: str) -> Any:
        def add(
            module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor | None:
            plan = self._active
            layer = None if plan is None else plan.bank.layers.get(name)
            if plan is None or layer is None:
                return None
            given = inputs[0] if plan.rows is None else inputs[0].index_select(0, plan.rows)
            weights = plan.weight(name, layer)
            if given.ndim > 2:
                weights = weights.unsqueeze(1)
            small = by_row(layer.down_of, given.to(layer.down.dtype))
            added = by_row(layer.up_of, small * weights)
            for place, gain in layer.gains:
                own = output if plan.rows is None else output.index_select(0, plan.rows)
                added = added + plan.scale(place, own.ndim) * _gained(module, gain, given, own)
            if plan.rows is None:
                return output + added.to(output.dtype)
            # index_add leaves the rows that have no adapter exactly as they are.
            return output.index_add(0, plan.rows, added.to(output.dtype))

        return add

    def forget(self, adapter: Adapter) -> None:
        """Drops what was made of an adapter that leaves the device, so that its memory is freed."""
        with self._lock:
            for key in [k for k in self._banks if id(adapter) in k]:
                self._drop(key)

    def remove(self) -> None:
        """Takes every hook off the denoiser."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._plans.clear()
        self._banks.clear()

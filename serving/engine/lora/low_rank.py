"""What an adapter adds to one linear layer, as two thin factors.

A file may write it otherwise (`lokr`, `loha`); here is the form in which it is applied. Sums over
singular values are float64: they decide what is exact.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

EXACT = 1e-6
"""Largest share of a change, by the Frobenius norm, that counts as nothing: below the rounding of
float32 factors of a few hundred ranks."""


@dataclass(frozen=True, slots=True)
class Magnitude:
    """A DoRA magnitude, before it is applied to the weights of a model.

    Attributes:
        values: [out_features] or [in_features], float32.
        per_row: the norm that it replaces is of each row (each output), else of each column.
        joint: the layers whose rows are normed together; more than one only per column.
    """

    values: torch.Tensor
    per_row: bool
    joint: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gain:
    """What DoRA adds to a layer besides its factors: a multiple of the layer's own output.

    Attributes:
        values: magnitude over norm, minus 1; [out_features] or [in_features].
        per_row: it multiplies the output, else the input.
    """

    values: torch.Tensor
    per_row: bool


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What an adapter adds to one linear layer: ``up @ down``, any alpha already in ``up``.

    Attributes:
        down: A, [rank, in_features].
        up: B times alpha / rank, [out_features, rank].
        magnitude: of a DoRA as the file has it; `dora.with_gains` makes ``gain`` of it.
    """

    down: torch.Tensor
    up: torch.Tensor
    magnitude: Magnitude | None = None
    gain: Gain | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LoraLayer:
        """A copy there; gains stay float32, for they may be close to zero."""
        gain = self.gain
        if gain is not None:
            gain = Gain(gain.values.to(device, non_blocking=True), gain.per_row)
        return dataclasses.replace(
            self,
            down=self.down.to(device, dtype, non_blocking=True),
            up=self.up.to(device, dtype, non_blocking=True),
            gain=gain,
        )


@dataclass(frozen=True, slots=True)
class Reduced:
    """The best approximation of a change by fewer ranks.

    Attributes:
        loss: share of the change that is left out, by the Frobenius norm: 0 is exact, 1 all of it.
        rank_needed: ranks that would leave out less than `EXACT`.
    """

    up: torch.Tensor
    down: torch.Tensor
    loss: float
    rank_needed: int


def reduce_rank(up: torch.Tensor, down: torch.Tensor, most: int) -> Reduced:
    """``up @ down`` with at most ``most`` ranks.

    QR of both factors and a singular value decomposition of the small product between them: the
    optimum of Eckart and Young, without the whole matrix.
    """
    left, left_core = torch.linalg.qr(up.double())
    right, right_core = torch.linalg.qr(down.double().t())
    u, values, v = torch.linalg.svd(left_core @ right_core.t())
    loss, needed = lost(values, most)
    kept = min(most, needed)
    root = values[:kept].sqrt()
    return Reduced(
        ((left @ u[:, :kept]) * root).float(),
        (root[:, None] * (v[:kept] @ right.t())).float(),
        loss,
        needed,
    )


def lost(values: torch.Tensor, most: int) -> tuple[float, int]:
    """What singular values (falling) after the first ``most`` are of all; and how many matter."""
    squares = values.double() ** 2
    total = float(squares.sum())
    if not total:
        return 0.0, 1
    # tails[k] is what is left out when k are kept.
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) / total
    needed = int((tails > EXACT**2).sum())
    return float(tails[min(most, len(squares))].sqrt()), max(1, needed)

"""A sampler as a table of numbers: each step is a weighted sum of tensors.

The next latents of every built-in sampler, and what it remembers, are sums of a few tensors: the
latents, the velocity, fresh noise, and what was remembered before. The weights depend on the noise
levels alone. So they are found once per schedule, by letting the solver step over unit vectors in
place of images, and a step of the engine is a handful of multiplications for all rows of a batch,
without a wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calotype.serving.engine.sampling.solvers import Evaluation

LATENTS, VELOCITY, NOISE, REMEMBERED = 0, 1, 2, 3
"""Places of the summands; from `REMEMBERED` on the tensors that the sampler remembers."""

Weights = tuple[tuple[float, ...], ...]
"""[outputs][summands]; the first output is the next latents, the others are remembered."""


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """All evaluations of a sampler on one schedule.

    Attributes:
        sigmas: noise level at each evaluation.
        timesteps: what the denoiser is given at each.
        weights: one table per evaluation.
        remembered: tensors kept from one evaluation to the next.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    weights: tuple[Weights, ...]
    remembered: int

    @property
    def evaluations(self) -> int:
        return len(self.weights)


def observe(evaluations: Sequence[Evaluation], remembered: int) -> tuple[Weights, ...]:
    """The weights with which a solver steps.

    Args:
        remembered: tensors that it keeps from one evaluation to the next.
    """
    units = torch.eye(REMEMBERED + remembered).unsqueeze(1)
    tables: list[Weights] = []
    for run in evaluations:
        rows = run(units[LATENTS], units[VELOCITY], list(units[REMEMBERED:]))
        tables.append(tuple(tuple(row[0].tolist()) for row in rows))
    return _without_unread(tables)


def _without_unread(tables: Sequence[Weights]) -> tuple[Weights, ...]:
    """Leaves out what is remembered but never read for the latents."""
    read: set[int] = set()
    outputs = {0}
    while outputs:
        columns = {
            place - REMEMBERED
            for table in tables
            for output in outputs
            for place, weight in enumerate(table[output])
            if place >= REMEMBERED and weight != 0.0
        }
        outputs = {slot + 1 for slot in columns - read}
        read |= columns
    kept = sorted(read)
    summands = [LATENTS, VELOCITY, NOISE, *(REMEMBERED + slot for slot in kept)]
    return tuple(
        tuple(tuple(table[output][s] for s in summands) for output in (0, *(k + 1 for k in kept)))
        for table in tables
    )


def apply(tables: Sequence[Weights], summands: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The weighted sums of a batch.

    Args:
        tables: of each row of the batch, all with equally many outputs.
        summands: in the order of `LATENTS`, `VELOCITY`, ..., each [rows, tokens, channels]; None
            where no row of the batch has a weight.

    Returns:
        One float32 tensor [rows, tokens, channels] per output.
    """
    given = next(s for s in summands if s is not None)
    # Rows that came together are at one step of one plan: their weights are plain numbers then.
    alike = all(table == tables[0] for table in tables)
    weights = (
        None
        if alike
        else torch.tensor(tables, dtype=torch.float32).to(given.device, non_blocking=True)
    )
    outputs: list[torch.Tensor] = []
    for output in range(len(tables[0])):
        total: torch.Tensor | None = None
        for place, summand in enumerate(summands):
            column = [table[output][place] for table in tables]
            if summand is None or not any(column):
                continue
            part = summand.float()
            if any(weight != 1.0 for weight in column):
                mine = column[0] if weights is None else weights[:, output, place].view(-1, 1, 1)
                part = mine * part
            if place == VELOCITY:
                # As diffusers rounds: this product in the model's dtype, the sum in float32.
                part = part.to(summand.dtype).float()
            total = part if total is None else total + part
        outputs.append(torch.zeros_like(given, dtype=torch.float32) if total is None else total)
    return outputs

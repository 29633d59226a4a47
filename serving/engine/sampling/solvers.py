"""The solvers that samplers are planned from, as functions of one evaluation each.

Equal to diffusers' FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler (DPM-Solver++ of
order 2, midpoint) and UniPCMultistepScheduler (order 2, B2), for models that predict a velocity.
They run once per schedule, on unit vectors (`linear_plan`); operations and their order are
diffusers', so that the weights are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

Evaluation = Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], list[torch.Tensor]]
"""(latents, velocity, remembered tensors) to the next latents and what is remembered then."""


def heun(sigmas: Sequence[float]) -> list[Evaluation]:
    """Each step but the last one is looked at from both ends. Remembers velocity and latents.

    Args:
        sigmas: noise levels of the schedule, 0 behind them.
    """
    levels = torch.tensor(tuple(sigmas))

    def predict(now: torch.Tensor, after: torch.Tensor) -> Evaluation:
        def run(
            latents: torch.Tensor, velocity: torch.Tensor, remembered: Sequence[torch.Tensor]
        ) -> list[torch.Tensor]:
            slope = (latents - (latents - velocity * now)) / now
            return [latents + slope * (after - now), slope, latents]

        return run

    def correct(now: torch.Tensor, after: torch.Tensor) -> Evaluation:
        def run(
            latents: torch.Tensor, velocity: torch.Tensor, remembered: Sequence[torch.Tensor]
        ) -> list[torch.Tensor]:
            before, start = remembered
            slope = (latents - (latents - velocity * after)) / after
            slope = 0.5 * (before + slope)
            nothing = torch.zeros_like(latents)
            return [start + slope * (after - now), nothing, nothing]

        return run

    steps = list(pairwise(levels))
    found = [one for step in steps[:-1] for one in (predict(*step), correct(*step))]
    return [*found, predict(*steps[-1])]


def dpmpp_2m(sigmas: Sequence[float]) -> list[Evaluation]:
    """DPM-Solver++ of order 2 (arXiv 2211.01095). Remembers the last predicted image.

    Args:
        sigmas: noise levels of the schedule, 0 behind them.
    """
    levels = torch.tensor(tuple(sigmas))
    steps = len(levels) - 1

    def evaluation(step: int) -> Evaluation:
        def run(
            latents: torch.Tensor, velocity: torch.Tensor, remembered: Sequence[torch.Tensor]
        ) -> list[torch.Tensor]:
            predicted = latents - levels[step] * velocity
            now, after = levels[step], levels[step + 1]
            h = _half_log_snr(after) - _half_log_snr(now)
            growth = (1 - after) * (torch.exp(-h) - 1.0)
            stepped = (after / now) * latents - growth * predicted
            if 0 < step < steps - 1:
                h_before = _half_log_snr(now) - _half_log_snr(levels[step - 1])
                slope = (1.0 / (h_before / h)) * (predicted - remembered[0])
                stepped = stepped - 0.5 * growth * slope
            return [stepped, predicted]

        return run

    return [evaluation(step) for step in range(steps)]


def unipc(sigmas: Sequence[float]) -> list[Evaluation]:
    """UniPC of order 2 (arXiv 2302.04867).

    Remembers the last two predicted images, the older one first, and the corrected latents.

    Args:
        sigmas: noise levels of the schedule, below 1, 0 behind them.
    """
    levels = torch.tensor(tuple(sigmas))
    steps = len(levels) - 1

    def order(step: int) -> int:
        return min(2, steps - step, step + 1)

    def evaluation(step: int) -> Evaluation:
        def run(
            latents: torch.Tensor, velocity: torch.Tensor, remembered: Sequence[torch.Tensor]
        ) -> list[torch.Tensor]:
            older, newer, start = remembered
            predicted = latents - levels[step] * velocity
            if step:
                latents = _corrected(levels, step, order(step - 1), start, predicted, newer, older)
            after = _predicted(levels, step, order(step), latents, predicted, newer)
            return [after, newer if step else torch.zeros_like(newer), predicted, latents]

        return run

    return [evaluation(step) for step in range(steps)]


def _predicted(
    levels: torch.Tensor,
    step: int,
    order: int,
    latents: torch.Tensor,
    predicted: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """UniP: the latents at the next level."""
    now, after = levels[step], levels[step + 1]
    h = _half_log_snr(after) - _half_log_snr(now)
    growth = torch.expm1(-h)
    stepped = after / now * latents - (1 - after) * growth * predicted
    if order == 1:
        return stepped
    ratio = (_half_log_snr(levels[step - 1]) - _half_log_snr(now)) / h
    return stepped - (1 - after) * growth * (0.5 * ((before - predicted) / ratio))


def _corrected(
    levels: torch.Tensor,
    step: int,
    order: int,
    start: torch.Tensor,
    predicted: torch.Tensor,
    before: torch.Tensor,
    older: torch.Tensor,
) -> torch.Tensor:
    """UniC: the latents at this level, with what the model says of them.

    Args:
        start: corrected latents at the level before.
        before: image predicted at the level before; ``older`` the one before that.
    """
    last, now = levels[step - 1], levels[step]
    h = _half_log_snr(now) - _half_log_snr(last)
    growth = torch.expm1(-h)
    stepped = now / last * start - (1 - now) * growth * before
    change = predicted - before
    if order == 1:
        return stepped - (1 - now) * growth * (0.5 * change)
    ratio = (_half_log_snr(levels[step - 2]) - _half_log_snr(last)) / h
    weights = _corrector_weights(ratio, h)
    slope = weights[0] * ((older - before) / ratio)
    return stepped - (1 - now) * growth * (slope + weights[1] * change)


def _corrector_weights(ratio: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    growth = torch.expm1(-h)
    ratios = torch.stack([ratio, torch.ones(())])
    phi = growth / -h - 1
    first = phi / growth
    phi = phi / -h - 1 / 2
    second = phi * 2 / growth
    matrix = torch.stack([torch.pow(ratios, 0), torch.pow(ratios, 1)])
    weights: torch.Tensor = torch.linalg.solve(matrix, torch.stack([first, second]))
    return weights


def _half_log_snr(sigma: torch.Tensor) -> torch.Tensor:
    return torch.log(1 - sigma) - torch.log(sigma)

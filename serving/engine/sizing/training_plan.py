"""What a LoRA training needs: memory, seconds a step, hours and dollars. Imports no torch.

Weights and factors are counted. Activations are estimates, and the time of a step is a roofline:
the arithmetic over the share of a GPU's peak that such steps reach. Both are said where printed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calotype.serving.core.errors import InvalidRequest, OutOfMemory
from calotype.serving.engine.sizing.memory_plan import (
    GB,
    RUNTIME_BYTES,
    Gpu,
    PlanPrecision,
    find_gpu,
)
from calotype.serving.engine.sizing.model_sizes import ModelSizes, measure_model, weight_bytes

PresetName = Literal["fast", "balanced", "quality"]
PRESETS: tuple[PresetName, ...] = ("fast", "balanced", "quality")


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps at one resolution, the side of a square picture in pixels."""

    steps: int
    resolution: int


_PHASES: dict[PresetName, tuple[Phase, ...]] = {
    "fast": (Phase(400, 512),),
    "balanced": (Phase(600, 512), Phase(200, 1024)),
    "quality": (Phase(600, 512), Phase(600, 1024)),
}
_SMALL_STEPS: dict[PresetName, int] = {"fast": 200, "balanced": 400, "quality": 800}
"""Of a miniature, at the one size that it draws."""


def preset_phases(preset: PresetName, *, small_side: int | None = None) -> tuple[Phase, ...]:
    """The phases of a preset.

    Args:
        small_side: the side of a miniature's pictures; None for a full model.

    Raises:
        InvalidRequest: there is no such preset.
    """
    if preset not in _PHASES:
        raise InvalidRequest(
            f"preset must be one of {', '.join(PRESETS)}; got {preset!r}.", param="preset"
        )
    if small_side is not None:
        return (Phase(_SMALL_STEPS[preset], small_side),)
    return _PHASES[preset]


PEAKS: dict[str, tuple[float, float]] = {
    "a10-24gb": (125, 0.75),
    "l4-24gb": (121, 0.70),
    "rtx-3090-24gb": (71, 0.30),
    "rtx-4090-24gb": (165, 0.50),
    "rtx-5090-32gb": (209, 0.80),
    "a100-40gb": (312, 1.50),
    "l40s-48gb": (362, 1.20),
    "a100-80gb": (312, 2.00),
    "h100-80gb": (989, 3.00),
    "h200-141gb": (989, 3.80),
    "b200-192gb": (2250, 5.50),
}
"""Dense bfloat16 TFLOP/s of the data sheet, and an assumed price in USD an hour."""
REACHED = 0.45
"""Share of the peak that a step reaches; measured figures of other trainers are near it."""
_BYTES_A_PARAMETER = {"8-bit AdamW": 4 + 4 + 4 + 2.1, "AdamW": 4 + 4 + 4 + 8}
"""Factor, gradient and average in float32, and the optimiser's two moments."""
_WORKING = 2.5
"""Of the block that is computed again: its activations and their gradients, in forward peaks."""
_FILLED = 0.97
"""Of a GPU's memory; the allocator loses some to gaps."""
_READ_BYTES = 1e9
"""A second, from disk to device: an assumption."""
PRESERVED = 4
"""The class is preserved in one of so many steps."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """One preset on one GPU. Bytes, seconds and USD.

    Attributes:
        precision: of the frozen base.
        step_seconds: of each phase, preservation spread over the steps.
    """

    preset: PresetName
    phases: tuple[Phase, ...]
    gpu: Gpu
    precision: PlanPrecision
    rank: int
    weights: float
    factors: float
    activations: float
    step_seconds: tuple[float, ...]
    other_seconds: float
    hourly: float

    @property
    def memory(self) -> float:
        return self.weights + self.factors + self.activations + RUNTIME_BYTES

    @property
    def fits(self) -> bool:
        return self.memory <= _FILLED * self.gpu.memory

    @property
    def hours(self) -> float:
        steps = sum(p.steps * s for p, s in zip(self.phases, self.step_seconds, strict=True))
        return (steps + self.other_seconds) / 3600

    @property
    def cost(self) -> float:
        return self.hours * self.hourly


def plan_training(
    model: str | pathlib.Path,
    gpu: str,
    *,
    precision: PlanPrecision | None = None,
    rank: int = 16,
    hourly: float | None = None,
    presets: Sequence[PresetName] = PRESETS,
    samples: int = 8,
    sample_steps: int = 50,
) -> list[TrainingPlan]:
    """The presets that fit a GPU, each with the best precision that does.

    Args:
        precision: bfloat16 or int8; None takes the best that fits.
        hourly: price of the GPU; None takes the assumed one.
        samples: pictures drawn on the way.

    Raises:
        InvalidRequest: a name is unknown.
        OutOfMemory: no preset fits (``insufficient_memory``); says what would.
    """
    card, sizes = find_gpu(gpu), measure_model(model)
    if not 1 <= rank <= 256:
        raise InvalidRequest(f"rank must be 1 to 256; got {rank}.", param="rank")
    choices: tuple[PlanPrecision, ...] = (precision,) if precision else ("bfloat16", "int8")
    found, first = [], None
    for preset in presets:
        for choice in choices:
            plan = _plan(sizes, card, preset, choice, rank, hourly, samples * sample_steps)
            first = first or plan
            if plan.fits:
                found.append(plan)
                break
    if not found:
        assert first is not None, "there is a preset"
        raise OutOfMemory(
            _refusal(sizes, card, presets, choices, rank), "insufficient_memory", "gpu"
        )
    return found


def _plan(
    sizes: ModelSizes,
    card: Gpu,
    preset: PresetName,
    precision: PlanPrecision,
    rank: int,
    hourly: float | None,
    sample_passes: int,
) -> TrainingPlan:
    phases = preset_phases(preset)
    peak, assumed = PEAKS[card.name]
    speed = peak * 1e12 * REACHED
    parameters = lora_parameters(sizes, rank)
    largest = max(phase.resolution for phase in phases)
    # Forward, forward again in the recomputed blocks, and the gradients of activations. Those of
    # the frozen weights are not needed. A preserved step runs the base once more, too.
    passes = 3 + 4 / PRESERVED
    seconds = tuple(passes * forward_flops(sizes, p.resolution) / speed for p in phases)
    sampling = sample_passes * forward_flops(sizes, largest) / speed
    read = sum(weight_bytes(p, "bfloat16") for p in (sizes.denoiser, sizes.text_encoder, sizes.vae))
    return TrainingPlan(
        preset,
        phases,
        card,
        precision,
        rank,
        weight_bytes(sizes.denoiser, precision) + weight_bytes(sizes.vae, precision),
        parameters * _BYTES_A_PARAMETER["8-bit AdamW"],
        _activations(sizes, largest, precision),
        seconds,
        sampling + read / _READ_BYTES,
        assumed if hourly is None else hourly,
    )


def lora_parameters(sizes: ModelSizes, rank: int) -> int:
    """Of factors on every linear layer of the blocks."""
    d, m = sizes.token.width, sizes.token.hidden
    # Eight attention matrices and two gated MLPs; one wide matrix in and one out.
    double = 8 * 2 * d + 2 * ((d + 2 * m) + (m + d))
    single = (d + 3 * d + 2 * m) + (d + m + d)
    return rank * (sizes.double_blocks * double + sizes.single_blocks * single)


def forward_flops(sizes: ModelSizes, resolution: int) -> float:
    """Of one picture with its text through the blocks, once."""
    d, m = sizes.token.width, sizes.token.hidden
    tokens = (resolution / sizes.pixels_per_token) ** 2 + sizes.text_tokens
    blocks = sizes.double_blocks + sizes.single_blocks
    # In a double-stream block a token passes half of the weights: those of its own stream.
    matrices = sizes.double_blocks * (4 * d * d + 3 * d * m) + sizes.single_blocks * (
        d * (3 * d + 2 * m) + (d + m) * d
    )
    return 2 * tokens * matrices + blocks * 4 * tokens**2 * d


def _activations(sizes: ModelSizes, resolution: int, precision: PlanPrecision) -> float:
    """Of the blocks' inputs, which are kept, and of the block that is computed again."""
    tokens = (resolution / sizes.pixels_per_token) ** 2 + sizes.text_tokens
    item = 4 if precision == "float32" else 2
    kept = (sizes.double_blocks + sizes.single_blocks) * tokens * sizes.token.width * item
    # The base's weights may be int8; what goes through them is bfloat16.
    return kept + _WORKING * sizes.denoiser_activations(resolution**2, "bfloat16") * item / 2


def _refusal(
    sizes: ModelSizes,
    card: Gpu,
    presets: Sequence[PresetName],
    choices: Sequence[PlanPrecision],
    rank: int,
) -> str:
    needed = _plan(sizes, card, presets[-1], choices[-1], rank, None, 0)
    lead = (
        f"A LoRA of rank {rank} on {sizes.name} with preset {needed.preset} and base in "
        f"{needed.precision} needs {needed.memory / GB:.1f} GB, but the {card.name} has "
        f"{card.memory / GB:.1f} GB"
    )
    cards = [card, *sorted((find_gpu(name) for name in PEAKS), key=lambda gpu: gpu.memory)]
    for other in cards:
        for preset in (*presets, *PRESETS):
            for precision in (*choices, "int8"):
                plan = _plan(sizes, other, preset, precision, rank, None, 0)
                if plan.fits:
                    parts = [f"on the {other.name}"] if other is not card else []
                    parts += [f"with preset {preset}"] if preset != needed.preset else []
                    parts += [f"with --precision {precision}"] if precision not in choices else []
                    return f"{lead}; it fits {' and '.join(parts)}."
    return f"{lead}; no known GPU holds it."


def plan_lines(model: str, plans: Sequence[TrainingPlan]) -> list[str]:
    """The plans as a table."""
    first = plans[0]
    lines = [
        f"LoRA of rank {first.rank} on {model}, {first.gpu.name}, one picture a step, "
        f"${first.hourly:.2f} an hour",
        "",
        f"{'preset':<10}{'steps':<26}{'base':<10}{'GB':>7}{'s a step':>14}{'hours':>8}{'USD':>8}",
    ]
    for plan in plans:
        steps = " + ".join(f"{p.steps} at {p.resolution}" for p in plan.phases)
        seconds = " / ".join(f"{s:.1f}" for s in plan.step_seconds)
        lines.append(
            f"{plan.preset:<10}{steps:<26}{plan.precision:<10}{plan.memory / GB:>7.1f}"
            f"{seconds:>14}{plan.hours:>8.2f}{plan.cost:>8.2f}"
        )
    lines += [
        "",
        f"GB of {first.gpu.memory / GB:.1f} that the GPU has: weights and factors are counted, "
        "activations estimated.",
        f"Seconds are a roofline: arithmetic over {REACHED:.0%} of {PEAKS[first.gpu.name][0]:g} "
        "TFLOP/s, not a measurement.",
    ]
    missing = [name for name in PRESETS if name not in {plan.preset for plan in plans}]
    if missing:
        lines.append(f"Does not fit: {', '.join(missing)}.")
    return lines

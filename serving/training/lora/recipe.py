"""How an adapter is trained: every number that decides what comes out. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.training_plan import Phase, PresetName, preset_phases

_MINIATURE_WIDTH = 1024
"""Denoisers narrower than this are miniatures: higher rates, small pictures, larger batches."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings of a run. Two runs with equal recipes, data and base give equal adapters.

    Attributes:
        phases: steps at a resolution, one after the other.
        batch: pictures of a step.
        learning_rate: peak; it rises over the first 5 % and falls over the last 20 % of all steps.
        guidance: fed to a distilled denoiser while it learns.
        ema: decay of the averaged weights, which are the result.
        caption_dropout: share of pictures that are learnt with an empty caption.
        preserve_every: every so many steps the class keeps what it drew; 0 = never.
        lean: above 0 noisy times come more often, which decide what is where; below 0 clean ones,
            which decide how it looks.
        recompute: trade time for memory in the blocks (gradient checkpointing).
        precision: of the frozen base: float32, bfloat16 or int8.
    """

    phases: tuple[Phase, ...]
    batch: int
    rank: int
    alpha: float
    learning_rate: float
    guidance: float
    ema: float
    seed: int = 0
    weight_decay: float = 1e-4
    clip: float = 1.0
    caption_dropout: float = 0.05
    preserve_every: int = 4
    preserve_weight: float = 1.0
    lean: float = 0.0
    recompute: bool = True
    precision: str = "bfloat16"
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    sample_every: int = 250

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def resolution_at(self, step: int) -> int:
        """Of step ``step``, counted from 0."""
        for phase in self.phases:
            if step < phase.steps:
                return phase.resolution
            step -= phase.steps
        return self.phases[-1].resolution

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(phase.resolution for phase in self.phases))

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """sha256 of what decides the result; how often it is saved or looked at does not."""
        told = self.to_json()
        for name in ("checkpoint_every", "keep_checkpoints", "sample_every"):
            del told[name]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def build_recipe(
    config: TransformerConfig,
    preset: PresetName = "balanced",
    *,
    side: int = 1024,
    serving_guidance: float = 4.0,
    precision: str = "bfloat16",
    style: bool = False,
    steps: int | None = None,
    resolution: int | None = None,
    **changed: object,
) -> Recipe:
    """The recipe of a preset for a model, with what the caller wants otherwise.

    Args:
        side: of the pictures that a miniature draws.
        serving_guidance: what a miniature, which was trained with it, is fed.
        style: a style: twice the rank, no preservation, captions dropped more often.
        steps: all of them, shared out among the phases as the preset does.
        resolution: of all of them.
        changed: fields of `Recipe`; None leaves the preset's.

    Raises:
        InvalidRequest: a number is out of range; says which and what is allowed.
    """
    small = config.inner_dim < _MINIATURE_WIDTH
    phases = preset_phases(preset, small_side=side if small else None)
    if steps is not None:
        if not 1 <= steps <= 100_000:
            raise InvalidRequest(f"steps must be 1 to 100000; got {steps}.", param="steps")
        phases = _shared(phases, steps)
    if resolution is not None:
        phases = (Phase(sum(p.steps for p in phases), resolution),)
    rank = (16 if small else 32) if style else (8 if small else 16)
    recipe = Recipe(
        phases,
        batch=8 if small else 1,
        rank=rank,
        alpha=float(rank),
        learning_rate=1e-3 if small else 1e-4,
        guidance=serving_guidance if small else 1.0,
        ema=0.98 if small else 0.99,
        caption_dropout=0.1 if style else 0.05,
        preserve_every=0 if style else 2 if small else 4,
        lean=(-0.5 if style else 0.0) + (0.9 if small else 0.0),
        recompute=not small,
        precision="float32" if small else precision,
        checkpoint_every=50 if small else 100,
        sample_every=100 if small else 250,
    )
    wanted = {name: value for name, value in changed.items() if value is not None}
    if "rank" in wanted and "alpha" not in wanted:
        wanted["alpha"] = float(str(wanted["rank"]))
    recipe = dataclasses.replace(recipe, **wanted)  # type: ignore[arg-type]
    _check(recipe)
    return recipe


def _shared(phases: tuple[Phase, ...], steps: int) -> tuple[Phase, ...]:
    whole = sum(phase.steps for phase in phases)
    found, left = [], steps
    for phase in phases[:-1]:
        share = round(steps * phase.steps / whole)
        found.append(Phase(share, phase.resolution))
        left -= share
    return tuple(p for p in (*found, Phase(left, phases[-1].resolution)) if p.steps)


def _check(recipe: Recipe) -> None:
    ranges: tuple[tuple[str, float, float, float], ...] = (
        ("rank", recipe.rank, 1, 256),
        ("alpha", recipe.alpha, 1e-3, 4096),
        ("batch", recipe.batch, 1, 256),
        ("learning_rate", recipe.learning_rate, 1e-8, 1),
        ("caption_dropout", recipe.caption_dropout, 0, 1),
        ("preserve_every", recipe.preserve_every, 0, 1_000_000),
        ("checkpoint_every", recipe.checkpoint_every, 1, 1_000_000),
        ("sample_every", recipe.sample_every, 0, 1_000_000),
        ("ema", recipe.ema, 0, 0.9999),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise InvalidRequest(f"{name} must be {low:g} to {high:g}; got {value:g}.", param=name)
    for phase in recipe.phases:
        if phase.resolution % 16 or not 64 <= phase.resolution <= 4096:
            raise InvalidRequest(
                f"resolution must be a multiple of 16 from 64 to 4096; got {phase.resolution}.",
                param="resolution",
            )

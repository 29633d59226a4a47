"""Which published FLUX.2 an adapter was made for, as far as its shapes say. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from calotype.serving.engine.lora.layer_names import GUIDANCE
from calotype.serving.engine.lora.layer_plan import LayerPlan
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.linear_layers import linear_layers
from calotype.serving.engine.sizing.model_sizes import KNOWN_MODELS


def guess_base(plans: Sequence[LayerPlan]) -> str | None:
    """The known model that has all of these layers; None if none has, or several have."""
    found = [name for name in KNOWN_MODELS if _fits(name, plans)]
    return found[0] if len(found) == 1 else None


def _fits(name: str, plans: Sequence[LayerPlan]) -> bool:
    shapes = linear_layers(TransformerConfig.from_json(KNOWN_MODELS[name].denoiser))
    return all(
        shapes.get(module) == (plan.rows // len(plan.layer.target.modules), plan.columns)
        for plan in plans
        for module in plan.layer.target.modules
        if not module.startswith(GUIDANCE)
    )

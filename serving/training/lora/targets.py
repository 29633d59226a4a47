"""Which layers of a FLUX.2 denoiser a LoRA is trained on: every linear layer of its blocks.

Named one by one, as the classes of FLUX.2 spell them, and counted against the configuration: a
pattern made for another model family matches a few layers and trains a weak adapter without a word.
Embedders, modulations, norms and the output projection are left alone.
"""

from __future__ import annotations

import torch

from calotype.serving.core.errors import TrainingFailed
from calotype.serving.engine.sizing.configs import TransformerConfig

DOUBLE = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
)  # fmt: skip
"""Linear layers of a double-stream block."""
SINGLE = ("attn.to_qkv_mlp_proj", "attn.to_out")
"""Linear layers of a single-stream block."""


def target_names(config: TransformerConfig) -> tuple[str, ...]:
    """The names of all targets of a denoiser, block by block; 192 for FLUX.2 [dev]."""
    return tuple(
        [f"transformer_blocks.{i}.{name}" for i in range(config.num_layers) for name in DOUBLE]
        + [
            f"single_transformer_blocks.{i}.{name}"
            for i in range(config.num_single_layers)
            for name in SINGLE
        ]
    )


def find_targets(model: torch.nn.Module, config: TransformerConfig) -> dict[str, torch.nn.Linear]:
    """The target layers of a denoiser, by name.

    Raises:
        TrainingFailed: a layer is missing, or the blocks have linear layers beside them
            (``target_modules_unmatched``).
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    wanted = target_names(config)
    in_blocks = {n for n in linears if n.startswith(("transformer_blocks.", "single_transformer_"))}
    missing, more = sorted(set(wanted) - in_blocks), sorted(in_blocks - set(wanted))
    if missing or more:
        raise TrainingFailed(
            f"The model's blocks should have {len(wanted)} linear layers to train, of which "
            f"{len(set(wanted) & in_blocks)} were found"
            + (f"; missing: {', '.join(missing[:3])}" if missing else "")
            + (f"; unknown: {', '.join(more[:3])}" if more else "")
            + ". Check that config.json is the one of these weights.",
            code="target_modules_unmatched",
            param="model",
        )
    return {name: linears[name] for name in wanted}

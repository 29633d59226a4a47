"""The linear layers of a denoiser, from its configuration; imports no torch.

A test holds them to the modules of `engine.model.transformer`.
"""

from __future__ import annotations

from calotype.serving.engine.sizing.configs import TransformerConfig


def linear_layers(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Module name -> (out_features, in_features), in the model's order."""
    width = config.inner_dim
    hidden = int(width * config.mlp_ratio)
    steps = config.timestep_guidance_channels
    found: dict[str, tuple[int, int]] = {}
    embedders = ("timestep_embedder", "guidance_embedder")[: 1 + config.guidance_embeds]
    for embedder in embedders:
        found[f"time_guidance_embed.{embedder}.linear_1"] = (width, steps)
        found[f"time_guidance_embed.{embedder}.linear_2"] = (width, width)
    for stream, sets in (("double_stream_modulation_img", 2), ("double_stream_modulation_txt", 2),
                         ("single_stream_modulation", 1)):  # fmt: skip
        found[f"{stream}.linear"] = (3 * sets * width, width)
    found["x_embedder"] = (width, config.in_channels)
    found["context_embedder"] = (width, config.joint_attention_dim)
    for place in range(config.num_layers):
        block = f"transformer_blocks.{place}"
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                      "to_add_out"):  # fmt: skip
            found[f"{block}.attn.{layer}"] = (width, width)
        for mlp in ("ff", "ff_context"):
            found[f"{block}.{mlp}.linear_in"] = (2 * hidden, width)
            found[f"{block}.{mlp}.linear_out"] = (width, hidden)
    for place in range(config.num_single_layers):
        block = f"single_transformer_blocks.{place}.attn"
        found[f"{block}.to_qkv_mlp_proj"] = (3 * width + 2 * hidden, width)
        found[f"{block}.to_out"] = (width, width + hidden)
    found["norm_out.linear"] = (2 * width, width)
    out = config.patch_size**2 * (config.out_channels or config.in_channels)
    found["proj_out"] = (out, width)
    return found

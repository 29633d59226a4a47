"""Keys of other trainers are converted as diffusers converts them, to the bit."""

from __future__ import annotations

import pytest
import torch

from calotype.serving.engine.lora.bfl_keys import from_bfl, from_kohya
from calotype.serving.engine.lora.lora_file import linear_shapes

pytestmark = pytest.mark.slow


def layers_of(model, rank):
    """A random LoRA under Black Forest Labs' names, of every layer that they have one for."""
    generator = torch.Generator().manual_seed(6)
    sizes = linear_shapes(model)
    found = {}
    for name, parts in (
        ("double_blocks.0.img_attn.qkv", ["transformer_blocks.0.attn.to_q"] * 3),
        ("double_blocks.0.txt_attn.qkv", ["transformer_blocks.0.attn.add_q_proj"] * 3),
        ("double_blocks.0.img_attn.proj", ["transformer_blocks.0.attn.to_out.0"]),
        ("double_blocks.0.txt_attn.proj", ["transformer_blocks.0.attn.to_add_out"]),
        ("double_blocks.0.img_mlp.0", ["transformer_blocks.0.ff.linear_in"]),
        ("double_blocks.0.img_mlp.2", ["transformer_blocks.0.ff.linear_out"]),
        ("double_blocks.0.txt_mlp.0", ["transformer_blocks.0.ff_context.linear_in"]),
        ("double_blocks.0.txt_mlp.2", ["transformer_blocks.0.ff_context.linear_out"]),
        ("single_blocks.1.linear1", ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"]),
        ("single_blocks.1.linear2", ["single_transformer_blocks.1.attn.to_out"]),
        ("img_in", ["x_embedder"]),
        ("txt_in", ["context_embedder"]),
        ("time_in.in_layer", ["time_guidance_embed.timestep_embedder.linear_1"]),
        ("time_in.out_layer", ["time_guidance_embed.timestep_embedder.linear_2"]),
        ("final_layer.linear", ["proj_out"]),
    ):
        rows, columns = sizes[parts[0]]
        found[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        up = torch.randn(len(parts) * rows, rank, generator=generator)
        found[f"{name}.lora_B.weight"] = up
    return found


def without_prefix(converted):
    return {key.removeprefix("transformer."): value for key, value in converted.items()}


def assert_same(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def test_black_forest_labs_keys_are_converted_as_diffusers_does(components):
    from diffusers.loaders import lora_conversion_utils as conversions

    tensors = layers_of(components.denoiser, rank=4) | {
        f"{name}.lora_{letter}.weight": torch.ones(2, 2)
        for name in (
            "guidance_in.in_layer",
            "guidance_in.out_layer",
            "final_layer.adaLN_modulation.1",
            "single_stream_modulation.lin",
            "double_stream_modulation_img.lin",
            "double_stream_modulation_txt.lin",
        )
        for letter in "AB"
    }
    given = {f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    theirs = conversions._convert_non_diffusers_flux2_lora_to_diffusers(given)
    ours, unknown = from_bfl(tensors)
    assert unknown == []
    assert_same(ours, without_prefix(theirs))


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0, 24.0])
@pytest.mark.parametrize("rank", [4, 6])
def test_kohya_keys_are_converted_as_diffusers_does(components, alpha, rank):
    from diffusers.loaders import lora_conversion_utils as conversions

    tensors = {}
    for key, tensor in layers_of(components.denoiser, rank).items():
        layer, letter = key.removesuffix(".weight").rsplit(".lora_", 1)
        name = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{name}.lora_{'down' if letter == 'A' else 'up'}.weight"] = tensor
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    # Query, key and value with ranks of their own are taken apart.
    up = tensors["lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight"]
    if rank == 6:
        rows = up.shape[0] // 3
        for part in range(3):
            for other in {0, 1, 2} - {part}:
                up[part * rows : (part + 1) * rows, 2 * other : 2 * other + 2] = 0
    theirs = conversions._convert_kohya_flux2_lora_to_diffusers(dict(tensors))
    ours, unknown = from_kohya(tensors)
    assert unknown == []
    assert_same(ours, without_prefix(theirs))
    query = ours["transformer_blocks.0.attn.add_q_proj.lora_A.weight"]
    assert query.shape[0] == (2 if rank == 6 else 4)

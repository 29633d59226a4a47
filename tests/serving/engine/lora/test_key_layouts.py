"""The files of every trainer draw the same picture, from all linear layers of a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.lora.lora_file import linear_shapes, read_lora

WAIT = 30.0
RANK = 4
BFL = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.linear_in"],
    "img_mlp.2": ["ff.linear_out"],
    "txt_mlp.0": ["ff_context.linear_in"],
    "txt_mlp.2": ["ff_context.linear_out"],
}
ONE_TO_ONE = {
    "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
    "single_blocks.1.linear1": "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "single_blocks.1.linear2": "single_transformer_blocks.1.attn.to_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
}


@pytest.fixture(scope="module")
def factors(components):
    """Module -> (A, B); values that eight bits hold, so that no type rounds them."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, size):
        values = torch.randn(*shape, generator=generator) * size
        return values.to(torch.float8_e4m3fn).float()

    return {
        module: (draw(RANK, columns, size=columns**-0.5), draw(rows, RANK, size=0.05))
        for module, (rows, columns) in linear_shapes(components.denoiser).items()
    }


def bfl(factors):
    """The same under Black Forest Labs' names: joint query, key and value; shift before scale."""
    found = {name: factors[module] for name, module in ONE_TO_ONE.items()}
    down, up = found["final_layer.adaLN_modulation.1"]
    scale, shift = up.chunk(2)
    found["final_layer.adaLN_modulation.1"] = down, torch.cat([shift, scale])
    for name, layers in BFL.items():
        parts = [factors[f"transformer_blocks.0.{layer}"] for layer in layers]
        up = torch.block_diag(*(part[1] for part in parts))
        found[f"double_blocks.0.{name}"] = torch.cat([part[0] for part in parts]), up
    return found


def peft(prefix, factors, a="lora_A", b="lora_B"):
    return {
        key: value
        for name, (down, up) in factors.items()
        for key, value in (
            (f"{prefix}{name}.{a}.weight", down),
            (f"{prefix}{name}.{b}.weight", up),
        )
    }


def scaled(prefix, factors, *, dots=False, alpha=float):
    """With an alpha of half the rank, and factors that are twice as large for it."""
    found = {}
    for name, (down, up) in factors.items():
        key = prefix + (name if dots else name.replace(".", "_"))
        found[f"{key}.lora_down.weight"] = down
        found[f"{key}.lora_up.weight"] = up * 2
        found[f"{key}.alpha"] = torch.tensor(alpha(len(down) / 2))
    return found


def typed(tensors, dtype):
    return {key: value.to(dtype) for key, value in tensors.items()}


LAYOUTS = {
    "diffusers": (lambda f: peft("transformer.", f), "diffusers"),
    "peft": (lambda f: peft("base_model.model.", f), "peft"),
    "peft in a pipeline": (lambda f: peft("transformer.base_model.model.", f), "peft"),
    "peft, live": (lambda f: peft("base_model.model.", f, "lora_A.default", "lora_B.default"),
                   "peft"),
    "onetrainer": (lambda f: scaled("transformer.", f, dots=True), "onetrainer"),
    "onetrainer, earlier": (lambda f: scaled("lora_transformer_", f), "onetrainer"),
    "simpletuner, lycoris": (lambda f: scaled("lycoris_", f), "lycoris"),
    "ai-toolkit": (lambda f: peft("diffusion_model.", bfl(f)), "ai-toolkit"),
    "comfy": (lambda f: scaled("model.diffusion_model.", bfl(f), dots=True), "comfy"),
    "comfy, expanded": (lambda f: peft("diffusion_model.", f), "comfy"),
    "fal": (lambda f: peft("base_model.model.", bfl(f)), "fal"),
    "bfl": (lambda f: peft("", bfl(f)), "bfl"),
    "kohya": (lambda f: scaled("lora_unet_", bfl(f)), "kohya"),
    "kohya, whole alpha": (lambda f: scaled("lora_unet_", bfl(f), alpha=int), "kohya"),
    "musubi": (lambda f: scaled("lora_unet_", bfl(f)), "musubi-tuner"),
    "fp16": (lambda f: typed(peft("transformer.", f), torch.float16), "diffusers"),
    "bf16": (lambda f: typed(scaled("lora_unet_", bfl(f)), torch.bfloat16), "kohya"),
    "fp8": (lambda f: typed(peft("diffusion_model.", bfl(f)), torch.float8_e4m3fn), "ai-toolkit"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(factors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    for place, (name, (write, _)) in enumerate(LAYOUTS.items()):
        found[name] = folder / f"{place}.safetensors"
        tensors = {key: value.contiguous() for key, value in write(factors).items()}
        module = {"musubi": "networks.lora_flux_2", "kohya": "networks.lora_flux"}.get(name, "")
        save_file(tensors, str(found[name]), {"ss_network_module": module})
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_of_every_layout_is_in_its_place(files, factors, components, name):
    shapes = linear_shapes(components.denoiser)
    file = read_lora(files[name], shapes, max_rank=256, dtype=torch.float32)
    assert file.layout == LAYOUTS[name][1]
    assert list(file.layers) == list(file.layers) and set(file.layers) == set(shapes)
    for module, (down, up) in factors.items():
        layer = file.layers[module]
        assert layer.rank == RANK, module
        assert torch.equal(layer.up @ layer.down, up @ down), module
    coverage = file.coverage
    assert (coverage.matched, coverage.total) == (len(shapes), len(shapes))
    assert str(coverage) == "27 of 27 linear layers"
    blocks = {block.block: (block.matched, block.total) for block in coverage.blocks}
    assert blocks["transformer_blocks.0"] == (12, 12)
    assert blocks["single_transformer_blocks.1"] == (2, 2)
    assert blocks["outside the blocks"] == (11, 11)


def test_every_layout_draws_the_picture_of_diffusers_layout(
    files, components, new_engine, make_request
):
    store = AdapterStore(components.denoiser)
    engine = new_engine(adapters=store)
    engine.add(make_request("plain"))
    for name, path in files.items():
        store.load(name, path, wait=WAIT)
        engine.add(make_request(name, adapters=(AdapterRef(name),)))
    drawn = engine.run()
    store.layers.remove()
    expected = drawn.image("diffusers")
    assert np.abs(expected - drawn.image("plain")).max() > 0.01
    for name in files:
        np.testing.assert_allclose(drawn.image(name), expected, atol=1e-4, rtol=0, err_msg=name)
    assert store.places()["kohya"].coverage.matched == 27


def test_a_shared_first_factor_of_query_key_and_value_is_kept(components, tmp_path):
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(6, 64, generator=generator), torch.randn(192, 6, generator=generator)
    path = tmp_path / "shared.safetensors"
    save_file(peft("", {"double_blocks.0.img_attn.qkv": (down, up)}), str(path))
    shapes = linear_shapes(components.denoiser)
    layers = read_lora(path, shapes, max_rank=8, dtype=torch.float32).layers
    for layer, part in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
        found = layers[f"transformer_blocks.0.attn.{layer}"]
        assert torch.equal(found.down, down) and torch.equal(found.up, part)


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_adapter_metadata": {"transformer.lora_alpha": 2}}, 0.5),
        ({"lora_adapter_metadata": {"transformer.lora_alpha": 8, "transformer.alpha_pattern":
                                    {"proj_out": 1}}}, 0.25),
        ({"lora_adapter_metadata": {"transformer.lora_alpha": 2, "transformer.use_rslora": True}},
         1.0),
        ({}, 1.0),
    ],
)  # fmt: skip
def test_alpha_of_peft_metadata(components, factors, tmp_path, metadata, scale):
    path = tmp_path / "alpha.safetensors"
    one = {"proj_out": factors["proj_out"]}
    save_file(peft("transformer.", one), str(path), {k: json.dumps(v) for k, v in metadata.items()})
    shapes = linear_shapes(components.denoiser)
    layer = read_lora(path, shapes, max_rank=8, dtype=torch.float32).layers["proj_out"]
    assert torch.equal(layer.up, factors["proj_out"][1] * scale)

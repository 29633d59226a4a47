"""Our modules compute what the diffusers classes of the same weights compute, to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    Flux2Transformer2DModel,
    UniPCMultistepScheduler,
)
from diffusers.loaders import lora_conversion_utils as conversions

from calotype.serving.config.built_in import BUILT_IN_MODEL
from calotype.serving.engine.execution.forward import Forward, rotary_tables
from calotype.serving.engine.lora.bfl_keys import from_bfl, from_kohya
from calotype.serving.engine.lora.lora_file import linear_shapes
from calotype.serving.engine.model.autoencoder import Autoencoder
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.latents import TokenGrid, image_ids, text_ids
from calotype.serving.engine.model.noise_schedule import ScheduleConfig
from calotype.serving.engine.model.row_linear import keep_rows_apart
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.sampling import solvers
from calotype.serving.engine.scheduling.scheduler import Bucket
from calotype.serving.engine.sizing.configs import AutoencoderConfig, TransformerConfig
from calotype.serving.weights.sources import model_folder as folder_of

SHAPES = folder_of(BUILT_IN_MODEL)


@pytest.fixture(scope="module")
def shapes():
    return load_components(SHAPES, parts=("denoiser", "vae"))


@torch.inference_mode()
@pytest.mark.parametrize("folder", ["tiny", "shapes"])
def test_a_forward_pass_is_the_transformers(folder, model_folder, components, shapes):
    path, ours = (model_folder, components) if folder == "tiny" else (SHAPES, shapes)
    theirs = Flux2Transformer2DModel.from_pretrained(path / "transformer").eval()
    keep_rows_apart(theirs)
    config, bucket = ours.denoiser.config, Bucket(4, 6, 16, ((4, 4),))
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 24 + 16, config.in_channels, generator=generator)
    embeds = torch.randn(3, 16, config.joint_attention_dim, generator=generator)
    timestep, guidance = torch.tensor([0.9, 0.31, 1.0]), torch.tensor([1.0, 2.5, 7.0])
    ids = torch.cat([image_ids(TokenGrid(4, 6)), image_ids(TokenGrid(4, 4), 10)])
    wanted = theirs(
        hidden_states=hidden,
        encoder_hidden_states=embeds,
        timestep=timestep,
        guidance=guidance,
        img_ids=ids,
        txt_ids=text_ids(16),
        return_dict=False,
    )[0][:, :24]
    found = Forward(ours.denoiser)(hidden, timestep, guidance, embeds, bucket)
    assert torch.equal(found, wanted)
    tables = theirs.pos_embed(torch.cat([text_ids(16), ids]))
    found_tables = rotary_tables(ours.denoiser, bucket, hidden.device)
    assert all(map(torch.equal, found_tables, tables))


@torch.inference_mode()
@pytest.mark.parametrize("folder", ["tiny", "shapes"])
@pytest.mark.parametrize("tiled", [False, True])
def test_encoding_and_decoding_are_the_autoencoders(
    folder, model_folder, components, shapes, tiled
):
    path, ours = (model_folder, components) if folder == "tiny" else (SHAPES, shapes)
    theirs = AutoencoderKLFlux2.from_pretrained(path / "vae").eval()
    theirs.to(memory_format=torch.channels_last)
    side = theirs.config.sample_size + 32 if tiled else 48
    if tiled:
        assert side <= 300, "a tile of the tests' models is small"
        theirs.enable_tiling()
    pixels = torch.rand(2, 3, side, side - 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    wanted = theirs.encode(pixels).latent_dist.mode()
    latents = ours.vae.encode(pixels, tiled=tiled)
    assert torch.equal(latents, wanted)
    assert torch.equal(ours.vae.decode(latents, tiled=tiled), theirs.decode(wanted).sample)


def test_modules_and_defaults_are_those_of_flux2():
    with torch.device("meta"):
        pairs = [
            (Transformer(TransformerConfig()), Flux2Transformer2DModel()),
            (Autoencoder(AutoencoderConfig()), AutoencoderKLFlux2()),
            (
                Transformer(TransformerConfig.from_json({"guidance_embeds": False})),
                Flux2Transformer2DModel(guidance_embeds=False),
            ),
            (
                Autoencoder(AutoencoderConfig.from_json({"decoder_block_out_channels": [32] * 4})),
                AutoencoderKLFlux2(decoder_block_out_channels=[32] * 4),
            ),
        ]
    for ours, theirs in pairs:
        shapes = [
            {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            for model in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
        {"shift": 2.0, "use_karras_sigmas": True},
        {"shift": 2.0, "use_exponential_sigmas": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_noise_levels_are_the_schedulers(config, steps):
    if config.get("shift_terminal") and steps == 1:
        pytest.skip("one level cannot be stretched")
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    levels = np.linspace(1.0, 1 / steps, steps)
    theirs.set_timesteps(sigmas=levels, mu=1.7)
    ours = ScheduleConfig.from_json(config).sigmas(levels.tolist(), 1.7)
    assert ours == tuple(theirs.sigmas.tolist())


@pytest.mark.parametrize(
    "config",
    [
        {"stochastic_sampling": True},
        {"invert_sigmas": True},
        {"use_beta_sigmas": True},
        {"time_shift_type": "cubic"},
        {"use_karras_sigmas": True, "use_exponential_sigmas": True},
    ],
    ids=str,
)
def test_schedules_that_flux2_does_not_use_are_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        ScheduleConfig.from_json(config)


def heun(sigmas):
    levels = torch.tensor(sigmas)
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(len(sigmas) - 1)
    inner = levels[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([levels[:1], inner, levels[-1:]])
    return scheduler, solvers.heun(sigmas), 2


def dpmpp_2m(sigmas):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas)
    return scheduler, solvers.dpmpp_2m(sigmas), 1


def unipc(sigmas):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=np.array(sigmas[:-1]))
    return scheduler, solvers.unipc(scheduler.sigmas.tolist()), 3


@pytest.mark.parametrize("solver", [heun, dpmpp_2m, unipc], ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_solver_steps_as_its_scheduler(solver, steps):
    sigmas = ScheduleConfig(shift=1.8).sigmas(np.linspace(1.0, 1 / steps, steps).tolist(), 0.0)
    scheduler, evaluations, remembered = solver(sigmas)
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(5)
    ours = theirs = torch.randn(1, 6, generator=generator)
    kept = [torch.zeros_like(ours)] * remembered
    for run in evaluations:
        velocity = torch.randn(1, 6, generator=generator)
        theirs = scheduler.step(velocity, 0.0, theirs, return_dict=False)[0]
        ours, *kept = run(ours, velocity, kept)
        assert torch.equal(ours, theirs)
    assert torch.isfinite(ours).all()


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


def test_configurations_that_describe_something_else_are_refused():
    content = json.loads((SHAPES / "vae" / "config.json").read_text())
    for change in (
        {"act_fn": "gelu"},
        {"down_block_types": ["AttnDownEncoderBlock2D"] * 4},
        {"up_block_types": ["AttnUpDecoderBlock2D"] * 4},
    ):
        with pytest.raises(ValueError, match="not known"):
            AutoencoderConfig.from_json(content | change)

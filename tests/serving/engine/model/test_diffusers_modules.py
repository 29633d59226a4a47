"""Our modules compute what the diffusers classes of the same weights compute, to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from calotype.serving.config.built_in import BUILT_IN_MODEL
from calotype.serving.engine.execution.forward import Forward, rotary_tables
from calotype.serving.engine.model.autoencoder import Autoencoder
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.latents import TokenGrid, image_ids, text_ids
from calotype.serving.engine.model.noise_schedule import ScheduleConfig
from calotype.serving.engine.model.row_linear import keep_rows_apart
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.scheduling.scheduler import Bucket
from calotype.serving.engine.sizing.configs import AutoencoderConfig, TransformerConfig
from calotype.serving.weights.sources import model_folder as folder_of

pytestmark = pytest.mark.slow
SHAPES = folder_of(BUILT_IN_MODEL)


@pytest.fixture(scope="module")
def shapes():
    return load_components(SHAPES, parts=("denoiser", "vae"))


@torch.inference_mode()
@pytest.mark.parametrize("folder", ["tiny", "shapes"])
def test_a_forward_pass_is_the_transformers(folder, model_folder, components, shapes):
    from diffusers import Flux2Transformer2DModel

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
    from diffusers import AutoencoderKLFlux2

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
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

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
    from diffusers import FlowMatchEulerDiscreteScheduler

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


def test_configurations_that_describe_something_else_are_refused():
    content = json.loads((SHAPES / "vae" / "config.json").read_text())
    for change in (
        {"act_fn": "gelu"},
        {"down_block_types": ["AttnDownEncoderBlock2D"] * 4},
        {"up_block_types": ["AttnUpDecoderBlock2D"] * 4},
    ):
        with pytest.raises(ValueError, match="not known"):
            AutoencoderConfig.from_json(content | change)

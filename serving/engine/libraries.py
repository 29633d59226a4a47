"""The classes of diffusers that the engine uses, imported when first needed."""

from __future__ import annotations

from typing import Any


def denoiser_class() -> Any:
    """diffusers' Flux2Transformer2DModel."""
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    return Flux2Transformer2DModel


def vae_class() -> Any:
    """diffusers' AutoencoderKLFlux2."""
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    return AutoencoderKLFlux2


def flow_euler_class() -> Any:
    """diffusers' FlowMatchEulerDiscreteScheduler."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    return FlowMatchEulerDiscreteScheduler


def lora_converter(form: str) -> Any:
    """diffusers' converter of FLUX.2 LoRA keys: of "kohya" or of "diffusion_model" files."""
    from diffusers.loaders import lora_conversion_utils

    name = {
        "kohya": "_convert_kohya_flux2_lora_to_diffusers",
        "diffusion_model": "_convert_non_diffusers_flux2_lora_to_diffusers",
    }[form]
    return getattr(lora_conversion_utils, name)

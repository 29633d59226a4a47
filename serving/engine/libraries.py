"""The classes of diffusers and transformers that calotype uses, imported when first needed."""

from __future__ import annotations

import pathlib
from typing import Any

from calotype.serving.errors import ModelLoadFailed


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


def text_model_classes(kind: str) -> tuple[Any, Any]:
    """Configuration and model class, without head: of "mistral3"'s text half, or of "qwen3"."""
    if kind == "mistral3":
        from transformers.models.mistral.configuration_mistral import MistralConfig
        from transformers.models.mistral.modeling_mistral import MistralModel

        return MistralConfig, MistralModel
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    return Qwen3Config, Qwen3Model


def load_tokenizer(folder: pathlib.Path) -> Any:
    """transformers' fast tokenizer of a folder, with its chat template.

    The tokenizer alone, not PixtralProcessor around it: text needs no picture processing, and the
    processor cannot be imported without torchvision.

    Raises:
        ModelLoadFailed: there is no usable tokenizer, or it has no chat template.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise ModelLoadFailed(f"{folder} holds no usable tokenizer: {fault}.") from fault
    if tokenizer.chat_template is None:
        raise ModelLoadFailed(f"{folder} has no chat template (chat_template.jinja).")
    return tokenizer


def lora_converter(form: str) -> Any:
    """diffusers' converter of FLUX.2 LoRA keys: of "kohya" or of "diffusion_model" files."""
    from diffusers.loaders import lora_conversion_utils

    name = {
        "kohya": "_convert_kohya_flux2_lora_to_diffusers",
        "diffusion_model": "_convert_non_diffusers_flux2_lora_to_diffusers",
    }[form]
    return getattr(lora_conversion_utils, name)

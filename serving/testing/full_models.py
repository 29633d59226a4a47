"""Random FLUX.2 folders laid out as the published ones, written by diffusers and transformers.

Takes 20 s of CPU to import those libraries; `models.save_tiny_flux2` writes what most tests need
without them.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch

from calotype.serving.testing.models import (
    AUTOENCODER,
    CHAT_TEMPLATES,
    SPECIAL_TOKENS,
    TRANSFORMER,
    text_sizes,
    tokenizer_json,
    write_index,
)

FULL_LAYERS = {False: 40, True: 36}
"""Layers of the text encoders of FLUX.2 [dev] and of [klein], by whether it is [klein]."""


def save_full_flux2(
    folder: pathlib.Path | str, *, seed: int = 0, klein: bool = False
) -> pathlib.Path:
    """Writes a random FLUX.2 [dev] (or distilled [klein]) as the real folders are.

    Weights in several files with an index, a text encoder of as many layers, and no
    `calotype.json`, so that prompts have 512 tokens. Draws in about a tenth of a second a step.
    """
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Transformer2DModel,
    )

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        denoiser = Flux2Transformer2DModel(**TRANSFORMER, guidance_embeds=not klein)
        vae = AutoencoderKLFlux2(**AUTOENCODER)
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 2.0)
        tokenizer = _build_qwen_tokenizer() if klein else _build_tokenizer()
        text_encoder = _build_text_encoder(len(tokenizer), klein)
        # The usual start of 0.02 would make all prompts look alike to the denoiser.
        text_encoder.get_input_embeddings().weight.normal_(std=1.0)
    shard = {"max_shard_size": "128KB"}
    denoiser.save_pretrained(folder / "transformer", **shard)
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    text_encoder.save_pretrained(folder / "text_encoder", **shard)
    (tokenizer if klein else _processor(tokenizer)).save_pretrained(folder / "tokenizer")
    write_index(folder, klein)
    return folder


def _build_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_json(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        padding_side="right",
        truncation_side="right",
        model_max_length=512,
        chat_template=CHAT_TEMPLATES[False],
    )


def _build_qwen_tokenizer() -> Any:
    """The kind of tokenizer that FLUX.2 [klein]'s folder holds: bytes, hardly joined."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2TokenizerFast

    pieces = ["re", "ci", "rc", "le", "\u0120a"]  # U+0120 stands for a space
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces]
    return Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[(piece[0], piece[1]) for piece in pieces],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        model_max_length=512,
        chat_template=CHAT_TEMPLATES[True],
    )


def _processor(tokenizer: Any) -> Any:
    """The processor that FLUX.2 [dev]'s folder holds; only its tokenizer is used."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=16, spatial_merge_size=2)


def _build_text_encoder(vocabulary: int, klein: bool) -> Any:
    sizes = text_sizes(vocabulary, FULL_LAYERS[klein])
    if klein:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        return Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        image_size=64,
        patch_size=16,
    )
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=vision,
            text_config=MistralConfig(**sizes, sliding_window=None),
            image_token_index=SPECIAL_TOKENS.index("[IMG]"),
            spatial_merge_size=2,
            vision_feature_layer=-1,
        )
    )

"""FLUX.2 in miniature: the real diffusers and transformers classes at a laptop's size.

Upstream: diffusers' Flux2Transformer2DModel, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler;
transformers' Mistral3ForConditionalGeneration and PixtralProcessor.
"""

from __future__ import annotations

import json
import pathlib
import random
import re
import string
from typing import Any

import torch
from torch import Tensor

from calotype.serving.training.captions import sample_scene, with_surroundings

LATENT_CHANNELS = 12
TOKEN_CHANNELS = 4 * LATENT_CHANNELS
"""The denoiser sees 2 x 2 latent pixels as one token."""
TEXT_TOKENS = 32
"""Prompts are padded or cut to this many tokens; the padding is part of the function."""
OUT_LAYERS = (1, 2, 3)
TEXT_WIDTH = 64
SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]",
    "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% elif c['type'] == 'image' %}[IMG]{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
"""Prints the user's words only: FLUX.2's system message would fill the short context."""


def vocabulary() -> list[str]:
    """Special tokens, every word of the captions, and single characters for all other words."""
    rng = random.Random(5)
    words: set[str] = {","}
    for two in (False, True):
        for _ in range(6000):
            caption = with_surroundings(sample_scene(rng, None, two).caption, rng).lower()
            words |= {w for w in re.findall(r"[a-z0-9]+", caption) if len(w) > 1}
    words |= set("with and two one the of is are that this beside next behind object shape".split())
    known = [*SPECIAL_TOKENS, *sorted(words)]
    alphabet = string.digits + string.ascii_lowercase
    singles = [c for c in alphabet + string.punctuation if c not in words]
    return [*known, *singles, *("##" + c for c in alphabet)]


def build_processor() -> Any:
    """A PixtralProcessor around a WordPiece tokenizer in which every Latin word has tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(vocabulary())}
    raw = Tokenizer(models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=64))
    raw.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        padding_side="right",
        truncation_side="right",
        model_max_length=512,
    )
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 128}, patch_size=16),
        tokenizer=tokenizer,
        patch_size=16,
        spatial_merge_size=2,
        chat_template=CHAT_TEMPLATE,
    )


def build_text_encoder(vocabulary_size: int) -> Any:
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    text = MistralConfig(
        vocab_size=vocabulary_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=OUT_LAYERS[-1],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=100.0,
        sliding_window=None,
        tie_word_embeddings=True,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        image_size=128,
        patch_size=16,
    )
    model = Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=vision,
            text_config=text,
            image_token_index=SPECIAL_TOKENS.index("[IMG]"),
            spatial_merge_size=2,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.normal_(std=0.5)
    return model


def build_denoiser() -> Any:
    """1.7 M parameters; starts near the identity: modulations small, the output zero."""
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=TOKEN_CHANNELS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH * len(OUT_LAYERS),
        timestep_guidance_channels=128,
        mlp_ratio=3.0,
        axes_dims_rope=(4, 12, 12, 4),
        rope_theta=100,
        guidance_embeds=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.7 * parameter.shape[1] ** -0.5)
        for modulation in (
            model.double_stream_modulation_img,
            model.double_stream_modulation_txt,
            model.single_stream_modulation,
        ):
            modulation.linear.weight.mul_(0.3)
        model.norm_out.linear.weight.zero_()
        model.proj_out.weight.zero_()
    return model


def build_autoencoder() -> Any:
    """One norm group keeps colours; the second convolution of every residual block starts at 0."""
    from diffusers import AutoencoderKLFlux2
    from diffusers.models.resnet import ResnetBlock2D

    channels = (8, 16, 32, 64)
    model = AutoencoderKLFlux2(
        block_out_channels=channels,
        decoder_block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=128,
    )
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    return model


def token_ids(processor: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, each int64 [n, TEXT_TOKENS], as Flux2Pipeline makes them."""
    found = processor.tokenizer(
        ["<s>" + caption for caption in captions],
        padding="max_length",
        truncation=True,
        max_length=TEXT_TOKENS,
        return_tensors="pt",
        add_special_tokens=False,
    )
    return found["input_ids"], found["attention_mask"]


def encode_text(text_encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[n, TEXT_TOKENS, TEXT_WIDTH * 3]: hidden states of OUT_LAYERS side by side."""
    states = text_encoder.model.language_model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return torch.cat([states[layer] for layer in OUT_LAYERS], -1)


def patchify(latents: Tensor) -> Tensor:
    """[n, c, h, w] to [n, h/2 * w/2, 4c]; channels in Flux2Pipeline's order: (c, row, column)."""
    n, c, h, w = latents.shape
    packed = latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return packed.reshape(n, (h // 2) * (w // 2), 4 * c)


def unpatchify(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[n, rows * columns, 4c] back to latents [n, c, 2 rows, 2 columns]."""
    n, _, channels = tokens.shape
    grid = tokens.view(n, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, channels // 4, 2 * rows, 2 * columns)


def position_ids(rows: int, columns: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Image ids (0, row, column, 0) and text ids (0, 0, 0, place), as FLUX.2 numbers them."""
    zero = torch.arange(1)
    image = torch.cartesian_prod(zero, torch.arange(rows), torch.arange(columns), zero)
    text = torch.cartesian_prod(zero, zero, zero, torch.arange(TEXT_TOKENS))
    return image.to(device), text.to(device)


def save_model(folder: pathlib.Path, parts: dict[str, torch.nn.Module], dtype: torch.dtype) -> None:
    """Writes the diffusers-format folder, and calotype.json with what the format cannot say."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=parts["vae"].to(dtype),
        text_encoder=parts["text_encoder"].to(dtype),
        tokenizer=build_processor(),
        transformer=parts["denoiser"].to(dtype),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    settings = {"max_sequence_length": TEXT_TOKENS, "text_encoder_out_layers": list(OUT_LAYERS)}
    (folder / "calotype.json").write_text(json.dumps(settings, indent=2) + "\n")

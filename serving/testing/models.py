"""Tiny random FLUX.2 folders and LoRA files, for tests that need the real classes in seconds.

The folders have the layout of the full models (diffusers format, plus `calotype.json`), so that
everything which loads one loads the other. Upstream classes: diffusers' Flux2Transformer2DModel,
AutoencoderKLFlux2 and FlowMatchEulerDiscreteScheduler; transformers'
Mistral3ForConditionalGeneration (FLUX.2 [dev]) or Qwen3ForCausalLM (FLUX.2 [klein]).
"""

from __future__ import annotations

import json
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch

MAX_SEQUENCE_LENGTH = 32
OUT_LAYERS = (1, 2, 3)
LATENT_CHANNELS = 4
TEXT_DIM = 32

_SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[INST]",
    "[/INST]",
)
_WORDS = "a the of on red blue green yellow circle square star ring background left right".split()

# Prints the beginning of the system message only: the whole of it would fill the short context.
_DEV_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
    "{% if m['role'] == 'system' %}{{ c['text'][:7] }}[INST]{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
_KLEIN_TEMPLATE = (
    "{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)

LORA_TARGETS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.ff.linear_in",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_transformer_blocks.1.attn.to_out",
    "proj_out",
)
"""Modules of the denoiser that `save_random_lora` covers: both streams, both kinds of block."""


FULL_LAYERS = {False: 40, True: 36}
"""Layers of the text encoders of FLUX.2 [dev] and of [klein], by whether it is [klein]."""


def save_tiny_flux2(
    folder: pathlib.Path | str, *, seed: int = 0, klein: bool = False, full_layout: bool = False
) -> pathlib.Path:
    """Writes a random FLUX.2 [dev] (or distilled [klein]) in diffusers format.

    Pictures are squares of 16 pixels to the latent token; 64x64 draws in a few milliseconds a step.

    Args:
        full_layout: as the real folders are: weights in several files with an index, a text
            encoder of as many layers, and no `calotype.json`, so that prompts have 512 tokens.
            Draws in about a tenth of a second a step.
    """
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        denoiser = Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM * len(OUT_LAYERS),
            timestep_guidance_channels=32,
            mlp_ratio=3.0,
            axes_dims_rope=(4, 12, 12, 4),
            rope_theta=100,
            guidance_embeds=not klein,
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=1,
            mid_block_add_attention=False,
            sample_size=64,
        )
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 2.0)
        tokenizer = (
            _build_qwen_tokenizer()
            if klein and full_layout
            else _build_tokenizer(_KLEIN_TEMPLATE if klein else _DEV_TEMPLATE)
        )
        layers = FULL_LAYERS[klein] if full_layout else OUT_LAYERS[-1] + 1
        text_encoder = _build_text_encoder(len(tokenizer), klein, layers)
        # The usual start of 0.02 would make all prompts look alike to the denoiser.
        text_encoder.get_input_embeddings().weight.normal_(std=1.0)
    shard = {"max_shard_size": "128KB"} if full_layout else {}
    denoiser.save_pretrained(folder / "transformer", **shard)
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    text_encoder.save_pretrained(folder / "text_encoder", **shard)
    (_processor(tokenizer) if full_layout and not klein else tokenizer).save_pretrained(
        folder / "tokenizer"
    )
    index: dict[str, Any] = {
        "_class_name": "Flux2KleinPipeline" if klein else "Flux2Pipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", type(text_encoder).__name__],
        "tokenizer": ["transformers", "Qwen2TokenizerFast" if klein else "PixtralProcessor"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    if klein:
        index["is_distilled"] = True
    _write_json(folder / "model_index.json", index)
    if not full_layout:
        _write_json(
            folder / "calotype.json",
            {
                "max_sequence_length": MAX_SEQUENCE_LENGTH,
                "text_encoder_out_layers": list(OUT_LAYERS),
            },
        )
    return folder


def save_random_lora(
    model: pathlib.Path | str | torch.nn.Module,
    path: pathlib.Path | str,
    rank: int = 4,
    seed: int = 0,
    *,
    targets: Sequence[str] = LORA_TARGETS,
    alpha: float | None = None,
    strength: float = 0.5,
) -> pathlib.Path:
    """Writes a random LoRA in PEFT keys for a denoiser, or for the denoiser of a model folder.

    Args:
        alpha: written as PEFT's adapter metadata (scale alpha / rank); None leaves it out.
        strength: size of what the adapter adds, relative to an input of size 1.
    """
    from safetensors.torch import save_file

    shapes = _linear_shapes(model)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for target in targets:
        rows, columns = shapes[target]
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        up = torch.randn(rows, rank, generator=generator) * strength * rank**-0.5
        tensors[f"transformer.{target}.lora_A.weight"] = down
        tensors[f"transformer.{target}.lora_B.weight"] = up
    metadata = {"format": "pt"}
    if alpha is not None:
        # The form in which diffusers' save_lora_weights keeps PEFT's LoraConfig.
        config = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
        metadata["lora_adapter_metadata"] = json.dumps(
            {f"transformer.{key}": value for key, value in config.items()}
        )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata)
    return path


def _linear_shapes(model: pathlib.Path | str | torch.nn.Module) -> Mapping[str, tuple[int, int]]:
    if isinstance(model, torch.nn.Module):
        state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    else:
        from safetensors import safe_open

        file = pathlib.Path(model) / "transformer" / "diffusion_pytorch_model.safetensors"
        with safe_open(str(file), framework="pt") as opened:
            state = {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}
    return {
        key.removesuffix(".weight"): (shape[0], shape[1])
        for key, shape in state.items()
        if key.endswith(".weight") and len(shape) == 2
    }


def _build_tokenizer(template: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = string.digits + string.ascii_lowercase
    tokens = [*_SPECIAL, *_WORDS]
    tokens += [c for c in alphabet + string.punctuation if c not in tokens]
    tokens += ["##" + c for c in alphabet]
    raw = Tokenizer(
        models.WordPiece(
            {token: i for i, token in enumerate(tokens)},
            unk_token="<unk>",
            max_input_chars_per_word=64,
        )
    )
    raw.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(_SPECIAL[4:]),
        padding_side="right",
        truncation_side="right",
        model_max_length=512,
        chat_template=template,
    )


def _build_qwen_tokenizer() -> Any:
    """The kind of tokenizer that FLUX.2 [klein]'s folder holds: bytes, hardly joined."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2TokenizerFast

    pieces = ["re", "ci", "rc", "le", "\u0120a"]  # U+0120 stands for a space
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces]
    return Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[(piece[0], piece[1]) for piece in pieces],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(_SPECIAL[4:]),
        model_max_length=512,
        chat_template=_KLEIN_TEMPLATE,
    )


def _processor(tokenizer: Any) -> Any:
    """The processor that FLUX.2 [dev]'s folder holds; only its tokenizer is used."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=16, spatial_merge_size=2)


def _build_text_encoder(vocabulary: int, klein: bool, layers: int) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 2 * TEXT_DIM,
        # More layers than are used: loading must drop them and change nothing.
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
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
            image_token_index=_SPECIAL.index("[IMG]"),
            spatial_merge_size=2,
            vision_feature_layer=-1,
        )
    )


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

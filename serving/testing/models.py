"""Tiny random FLUX.2 folders and LoRA files, for tests that need a real model in seconds.

The folders have the layout of the full models (diffusers format, plus `calotype.json`), so that
everything which loads one loads the other, diffusers and transformers among it; neither is imported
here, because that takes 20 s of CPU.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from calotype.serving.engine.model.autoencoder import Autoencoder
from calotype.serving.engine.model.text_model import TextModel
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.sizing.configs import (
    AutoencoderConfig,
    TextModelConfig,
    TransformerConfig,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_SEQUENCE_LENGTH = 32
OUT_LAYERS = (1, 2, 3)
LATENT_CHANNELS = 4
TEXT_DIM = 32

SPECIAL_TOKENS = (
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

CHAT_TEMPLATES = {False: _DEV_TEMPLATE, True: _KLEIN_TEMPLATE}
"""By whether it is [klein]."""

LORA_TARGETS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.ff.linear_in",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_transformer_blocks.1.attn.to_out",
    "proj_out",
)
"""Modules of the denoiser that `save_random_lora` covers: both streams, both kinds of block."""


TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4 * LATENT_CHANNELS,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_DIM * len(OUT_LAYERS),
    "timestep_guidance_channels": 32,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (4, 12, 12, 4),
    "rope_theta": 100,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
    "sample_size": 64,
}
_UNREAD = {
    "multi_modal_projector.linear_1.weight": (TEXT_DIM, 16),
    "multi_modal_projector.linear_2.weight": (TEXT_DIM, TEXT_DIM),
    "multi_modal_projector.norm.weight": (16,),
    "multi_modal_projector.patch_merger.merging_layer.weight": (16, 64),
    "vision_tower.ln_pre.weight": (16,),
    "vision_tower.patch_conv.weight": (16, 3, 16, 16),
    "vision_tower.transformer.layers.0.attention.k_proj.weight": (16, 16),
    "vision_tower.transformer.layers.0.attention.o_proj.weight": (16, 16),
    "vision_tower.transformer.layers.0.attention.q_proj.weight": (16, 16),
    "vision_tower.transformer.layers.0.attention.v_proj.weight": (16, 16),
    "vision_tower.transformer.layers.0.attention_norm.weight": (16,),
    "vision_tower.transformer.layers.0.feed_forward.down_proj.weight": (16, 32),
    "vision_tower.transformer.layers.0.feed_forward.gate_proj.weight": (32, 16),
    "vision_tower.transformer.layers.0.feed_forward.up_proj.weight": (32, 16),
    "vision_tower.transformer.layers.0.ffn_norm.weight": (16,),
}
"""The vision half of FLUX.2 [dev]'s text encoder: in its file, and never loaded."""


def save_tiny_flux2(
    folder: pathlib.Path | str, *, seed: int = 0, klein: bool = False
) -> pathlib.Path:
    """Writes a random FLUX.2 [dev] (or distilled [klein]) in diffusers format.

    Images are squares of 16 pixels to the latent token; 64x64 draws in a few milliseconds a step.
    """
    folder = pathlib.Path(folder)
    vocabulary = tokenizer_json()
    # One layer more than is read: loading must drop it and change nothing.
    text = text_sizes(vocabulary.get_vocab_size(), OUT_LAYERS[-1] + 1)
    kind = "qwen3" if klein else "mistral3"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer = TransformerConfig.from_json(TRANSFORMER | {"guidance_embeds": not klein})
        denoiser = Transformer(transformer)
        autoencoder = AutoencoderConfig.from_json(AUTOENCODER)
        vae = Autoencoder(autoencoder)
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 2.0)
        encoder = TextModel(TextModelConfig.from_json(text, kind), text["num_hidden_layers"])
        for parameter in encoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.02)
        # With a start of 0.02 all prompts would look alike to the denoiser.
        encoder.embed_tokens.weight.normal_(std=1.0)
        unread = {} if klein else {key: torch.randn(size) for key, size in _UNREAD.items()}
    _save_part(
        folder / "transformer",
        _class("Flux2Transformer2DModel", transformer),
        denoiser.state_dict(),
    )
    _save_part(folder / "vae", _class("AutoencoderKLFlux2", autoencoder), vae.state_dict())
    prefix = "model." if klein else "language_model.model."
    states = {prefix + key: tensor for key, tensor in encoder.state_dict().items()}
    _save_part(folder / "text_encoder", _text_config(text, klein), states | unread, "model")
    (folder / "scheduler").mkdir()
    schedule = {"use_dynamic_shifting": True, "num_train_timesteps": 1000, "shift": 1.0}
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", **schedule},
    )
    _save_tokenizer(folder / "tokenizer", vocabulary, CHAT_TEMPLATES[klein])
    write_index(folder, klein)
    settings = {"max_sequence_length": MAX_SEQUENCE_LENGTH, "text_encoder_out_layers": OUT_LAYERS}
    _write_json(folder / "calotype.json", settings)
    return folder


def write_index(folder: pathlib.Path, klein: bool) -> None:
    """Writes `model_index.json`."""
    index: dict[str, Any] = {
        "_class_name": "Flux2KleinPipeline" if klein else "Flux2Pipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": [
            "transformers",
            "Qwen3ForCausalLM" if klein else "Mistral3ForConditionalGeneration",
        ],
        "tokenizer": ["transformers", "Qwen2TokenizerFast" if klein else "PixtralProcessor"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    _write_json(folder / "model_index.json", index | ({"is_distilled": True} if klein else {}))


def text_sizes(vocabulary: int, layers: int) -> dict[str, Any]:
    """Keyword arguments of a small text encoder's configuration."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 2 * TEXT_DIM,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _class(name: str, config: TransformerConfig | AutoencoderConfig) -> dict[str, Any]:
    return {"_class_name": name, "_diffusers_version": "0.42.1", **dataclasses.asdict(config)}


def _text_config(sizes: dict[str, Any], klein: bool) -> dict[str, Any]:
    if klein:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "tie_word_embeddings": True,
            **sizes,
        }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 64,
        "patch_size": 16,
    }
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": SPECIAL_TOKENS.index("[IMG]"),
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": True,
        "text_config": {"model_type": "mistral", "sliding_window": None, **sizes},
        "vision_config": vision,
    }


def _save_part(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    name: str = "diffusion_pytorch_model",
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, str(folder / f"{name}.safetensors"), {"format": "pt"})


def _save_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, template: str) -> None:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "extra_special_tokens": list(SPECIAL_TOKENS[4:]),
            "padding_side": "right",
            "truncation_side": "right",
            "model_max_length": 512,
        },
    )


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


def tokenizer_json() -> Tokenizer:
    """Words, letters and digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = string.digits + string.ascii_lowercase
    tokens = [*SPECIAL_TOKENS, *_WORDS]
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
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return raw


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

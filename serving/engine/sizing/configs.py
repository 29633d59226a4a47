"""The sizes of a FLUX.2's parts, as their ``config.json`` says them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from calotype.serving.core.json_object import JsonObject

_DOWN_BLOCK, _UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes of a transformer; fields and defaults (FLUX.2 [dev]) are those of diffusers.

    Attributes:
        in_channels: of a token's latents.
        num_layers: blocks with separate weights for image and text (double stream).
        num_single_layers: blocks with common weights (single stream).
        joint_attention_dim: width of the text embeddings.
        axes_dims_rope: share of the head width for each of the four position axes.
        guidance_embeds: the model is given a guidance scale.
    """

    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> TransformerConfig:
        """Reads a ``config.json``; entries that the class lacks are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        config = cls(**{key: value for key, value in content.items() if key in known})  # type: ignore[arg-type]
        return dataclasses.replace(config, axes_dims_rope=tuple(config.axes_dims_rope))

    @property
    def inner_dim(self) -> int:
        """Width of the token streams."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; fields and defaults are those of diffusers.

    Attributes:
        block_out_channels: channels at each resolution, from the pixels inwards.
        decoder_block_out_channels: those of the decoder, if it has others.
        sample_size: side of a tile in pixels.
        batch_norm_eps: of ``bn``, by which latents are normalised.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (_DOWN_BLOCK,) * 4
    up_block_types: tuple[str, ...] = (_UP_BLOCK,) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 32
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 1024
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, ...] = (2, 2)

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> AutoencoderConfig:
        """Reads a ``config.json``; entries that the class lacks are left out.

        Raises:
            ValueError: the model computes something that this module does not.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in content.items()
            if key in known
        }
        config = cls(**values)  # type: ignore[arg-type]
        if set(config.down_block_types) != {_DOWN_BLOCK}:
            raise ValueError(f"down_block_types {config.down_block_types} are not known")
        if set(config.up_block_types) != {_UP_BLOCK}:
            raise ValueError(f"up_block_types {config.up_block_types} are not known")
        if config.act_fn not in ("silu", "swish"):
            raise ValueError(f"the activation {config.act_fn!r} is not known")
        return config

    @property
    def tile_side(self) -> int:
        """Side of a tile in pixels."""
        return self.sample_size if isinstance(self.sample_size, int) else self.sample_size[0]

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for."""
        halvings: int = len(self.block_out_channels) - 1
        side: int = 2**halvings
        return side


@dataclass(frozen=True, slots=True)
class TextModelConfig:
    """Sizes of a language model.

    Attributes:
        layers: how many the whole model has; those above the last one read are not built.
        head_norm: query and key are normalised per head (Qwen3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    head_norm: bool

    @classmethod
    def from_json(cls, content: JsonObject, kind: str) -> TextModelConfig:
        """Reads transformers' ``config.json`` (of Mistral3, its ``text_config``).

        Raises:
            KeyError: a size is missing.
            ValueError: the model computes something that this module does not.
        """
        rope: JsonObject = content.get("rope_parameters") or content.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"rotary embeddings of type {rope.get('rope_type')!r} are not known")
        if content.get("hidden_act", "silu") != "silu":
            raise ValueError(f"the activation {content['hidden_act']!r} is not known")
        if content.get("sliding_window") and content.get("use_sliding_window", kind == "mistral3"):
            raise ValueError("sliding-window attention is not known")
        if content.get("attention_bias"):
            raise ValueError("attention biases are not known")
        heads = int(content["num_attention_heads"])
        hidden = int(content["hidden_size"])
        qwen = kind == "qwen3"
        return cls(
            vocab_size=int(content["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(content["intermediate_size"]),
            layers=int(content["num_hidden_layers"]),
            heads=heads,
            key_value_heads=int(content.get("num_key_value_heads") or heads),
            head_dim=int(content.get("head_dim") or (128 if qwen else hidden // heads)),
            rope_theta=float(({"rope_theta": 10_000.0} | content | rope)["rope_theta"]),
            eps=float(content.get("rms_norm_eps", 1e-6)),
            head_norm=qwen,
        )

"""How many parameters the parts of a model have, counted from their sizes.

A test holds each count to the modules of `engine.model`, which take torch to build.
"""

from __future__ import annotations

from dataclasses import dataclass

from calotype.serving.engine.sizing.configs import (
    AutoencoderConfig,
    TextModelConfig,
    TransformerConfig,
)


@dataclass(frozen=True, slots=True)
class PartSize:
    """Parameters of a part.

    Attributes:
        in_layers: those of the linear layers inside its repeated layers: what int8 makes smaller
            (`model.quantization`).
        rows: of the weights of these.
    """

    parameters: int
    in_layers: int = 0
    rows: int = 0


def count_transformer(config: TransformerConfig) -> PartSize:
    width, head = config.inner_dim, config.attention_head_dim
    hidden = int(width * config.mlp_ratio)
    doubles, singles = config.num_layers, config.num_single_layers
    # Of image and text each: query, key, value, output; and the gated MLP.
    double = 8 * width**2 + 2 * 3 * hidden * width
    double_rows = 8 * width + 2 * (2 * hidden + width)
    single = (3 * width + 2 * hidden) * width + (width + hidden) * width
    single_rows = 3 * width + 2 * hidden + width
    in_layers = doubles * double + singles * single
    embeddings = (1 + config.guidance_embeds) * (config.timestep_guidance_channels + width) * width
    modulations = (6 + 6 + 3) * width**2
    out = config.patch_size**2 * (config.out_channels or config.in_channels)
    ends = (config.in_channels + config.joint_attention_dim + 2 * width + out) * width
    norms = (4 * doubles + 2 * singles) * head
    return PartSize(
        in_layers + embeddings + modulations + ends + norms,
        in_layers,
        doubles * double_rows + singles * single_rows,
    )


def count_text_model(config: TextModelConfig, last_layer: int) -> PartSize:
    """Args:
    last_layer: the highest hidden state that is read; what is above it is not built.
    """
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.heads * head, config.key_value_heads * head
    layer = (2 * queries + 2 * keys + 3 * inner) * hidden
    rows = queries + 2 * keys + hidden + 2 * inner + hidden
    norms = last_layer * (2 * hidden + (2 * head if config.head_norm else 0))
    if last_layer == config.layers:
        norms += hidden
    return PartSize(
        config.vocab_size * hidden + last_layer * layer + norms,
        last_layer * layer,
        last_layer * rows,
    )


def count_autoencoder(config: AutoencoderConfig) -> PartSize:
    inwards = config.block_out_channels
    outwards = (config.decoder_block_out_channels or inwards)[::-1]
    latent = config.latent_channels
    encoder = (
        _conv(config.in_channels, inwards[0])
        + _blocks(inwards, len(config.down_block_types), config.layers_per_block)
        + _middle(inwards[-1], config)
        + _norm(inwards[-1])
        + _conv(inwards[-1], 2 * latent)
    )
    decoder = (
        _conv(latent, outwards[0])
        + _blocks(outwards, len(config.up_block_types), config.layers_per_block + 1)
        + _middle(outwards[0], config)
        + _norm(outwards[-1])
        + _conv(outwards[-1], config.out_channels)
    )
    quant = _conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else 0
    post = _conv(latent, latent, 1) if config.use_post_quant_conv else 0
    return PartSize(encoder + decoder + quant + post)


def _blocks(channels: tuple[int, ...], count: int, layers: int) -> int:
    """Resolutions of ``layers`` residual blocks each; all but the last resample."""
    total = 0
    for i in range(count):
        given, made = channels[max(i - 1, 0)], channels[i]
        total += _residual(given, made) + (layers - 1) * _residual(made, made)
        total += _conv(made, made) if i < len(channels) - 1 else 0
    return total


def _middle(channels: int, config: AutoencoderConfig) -> int:
    attention = _norm(channels) + 4 * (channels**2 + channels)
    return 2 * _residual(channels, channels) + attention * config.mid_block_add_attention


def _residual(given: int, made: int) -> int:
    shortcut = _conv(given, made, 1) if given != made else 0
    return _norm(given) + _conv(given, made) + _norm(made) + _conv(made, made) + shortcut


def _conv(given: int, made: int, side: int = 3) -> int:
    return given * made * side**2 + made


def _norm(channels: int) -> int:
    return 2 * channels

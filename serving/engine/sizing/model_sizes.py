"""How large a FLUX.2 is: its parameters, and what its activations take."""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.sizing.configs import (
    AutoencoderConfig,
    TextModelConfig,
    TransformerConfig,
)
from calotype.serving.engine.sizing.parameters import (
    PartSize,
    count_autoencoder,
    count_text_model,
    count_transformer,
)
from calotype.serving.engine.sizing.settings import read_settings

INT8_SCALE_BYTES = 4
"""torchao keeps one float32 scale for each row of a weight."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Parameters of a model's parts, and what its activations depend on.

    Attributes:
        vae_channels: channels of the VAE decoder at full resolution, and of what comes into it.
    """

    name: str
    denoiser: PartSize
    text_encoder: PartSize
    vae: PartSize
    token: TokenMemory
    vae_channels: tuple[int, int]
    text_tokens: int
    pixels_per_token: int
    double_blocks: int
    single_blocks: int

    def denoiser_activations(self, pixels: int, precision: str) -> float:
        """Bytes of one image in the denoiser."""
        tokens = pixels / self.pixels_per_token**2 + self.text_tokens
        return tokens * self.token.bytes(precision)

    def vae_activations(self, pixels: int, precision: str) -> float:
        """Bytes of the feature maps that are alive at full resolution.

        The map that comes into the decoder's last block stays until the block has ended; beside
        it the block's first layer holds two of its size, the second one four of its own.
        """
        own, given = self.vae_channels
        return pixels * max(given + 4 * own, 3 * given) * _item(precision)


@dataclass(frozen=True, slots=True)
class TokenMemory:
    """What one token takes while it goes through the denoiser.

    Attributes:
        width: d, of the denoiser.
        hidden: m, of its MLPs.
        head: width of an attention head.
        channels: of a token's latents.
    """

    width: int
    hidden: int
    head: int
    channels: int

    @classmethod
    def of(cls, config: TransformerConfig) -> TokenMemory:
        return cls(
            config.inner_dim,
            int(config.inner_dim * config.mlp_ratio),
            config.attention_head_dim,
            config.in_channels,
        )

    def bytes(self, precision: str) -> float:
        """At the widest place, which is in a single-stream block.

        At its end there are alive the stream and its norm (2 d), the fused projection (3 d of
        query, key and value, 2 m of the gated MLP), query and key turned (2 d), the attention's
        result (d), the MLP's (m) and both side by side (d + m). In int8 the fused projection
        itself is wider: torchao holds it as int32 and twice as float32, beside the stream and its
        norm in bfloat16 and the norm in int8 twice. All the time there are the latents, and the
        rotary tables in float32.
        """
        d, m, item = self.width, self.hidden, _item(precision)
        wide = (9 * d + 4 * m) * item
        if precision == "int8":
            wide = max(wide, 3 * 4 * (3 * d + 2 * m) + 2 * d * item + 2 * d)
        return wide + self.channels * item + 2 * 4 * self.head


def weight_bytes(part: PartSize, precision: str) -> float:
    """Bytes of a part's weights. The VAE has no layers that int8 makes smaller."""
    item = _item(precision)
    if precision != "int8":
        return part.parameters * item
    kept = part.parameters - part.in_layers
    return kept * item + part.in_layers + part.rows * INT8_SCALE_BYTES


def _item(precision: str) -> int:
    return 4 if precision == "float32" else 2


@dataclass(frozen=True, slots=True)
class KnownModel:
    """The published configuration of a model, as its Hugging Face repository states it."""

    denoiser: JsonObject
    text_kind: str
    text: JsonObject
    out_layers: tuple[int, ...]


_KLEIN_DENOISER = {"guidance_embeds": False, "attention_head_dim": 128}
_QWEN3 = {
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

KNOWN_MODELS: dict[str, KnownModel] = {
    # diffusers' defaults are those of FLUX.2 [dev]: 8 + 48 blocks, 48 heads of 128. The text
    # encoder is Mistral-Small-3.2-24B.
    "flux-2-dev": KnownModel(
        {},
        "mistral3",
        {
            "vocab_size": 131072,
            "num_hidden_layers": 40,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        (10, 20, 30),
    ),
    "flux-2-klein-9b": KnownModel(
        _KLEIN_DENOISER
        | {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
        "qwen3",
        _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288},
        (9, 18, 27),
    ),
    "flux-2-klein-4b": KnownModel(
        _KLEIN_DENOISER
        | {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
        "qwen3",
        _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728},
        (9, 18, 27),
    ),
}


def measure_model(model: str | pathlib.Path) -> ModelSizes:
    """Counts the parameters of a known model or of a local folder.

    Raises:
        InvalidRequest: there is no such model.
        ModelLoadFailed: the folder holds no FLUX.2 model.
    """
    name = str(model)
    if name in KNOWN_MODELS:
        known = KNOWN_MODELS[name]
        return _count_parts(
            name, known.denoiser, {}, known.text_kind, known.text, known.out_layers[-1], 512
        )
    folder = pathlib.Path(model)
    if not folder.is_dir():
        raise InvalidRequest(
            f"model must be one of {', '.join(KNOWN_MODELS)}, or a folder; got {name!r}.",
            param="model",
        )
    settings = read_settings(folder)
    configs = {
        part: _config(folder / part / "config.json")
        for part in ("transformer", "vae", "text_encoder")
    }
    text = configs["text_encoder"]
    return _count_parts(
        name,
        configs["transformer"],
        configs["vae"],
        "mistral3" if settings.chat_style == "mistral" else "qwen3",
        text.get("text_config", text),
        max(settings.text_encoder_out_layers),
        settings.max_sequence_length,
    )


def _config(path: pathlib.Path) -> JsonObject:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InvalidRequest(f"{path} cannot be read: {fault}.", param="model") from fault
    return {key: value for key, value in content.items() if not key.startswith("_")}


def _count_parts(
    name: str,
    denoiser_config: JsonObject,
    vae_config: JsonObject,
    text_kind: str,
    text_config: JsonObject,
    last_layer: int,
    text_tokens: int,
) -> ModelSizes:
    denoiser = TransformerConfig.from_json(denoiser_config)
    vae = AutoencoderConfig.from_json(vae_config)
    channels = vae.decoder_block_out_channels or vae.block_out_channels
    return ModelSizes(
        name=name,
        denoiser=count_transformer(denoiser),
        text_encoder=count_text_model(
            TextModelConfig.from_json(text_config, text_kind), last_layer
        ),
        vae=count_autoencoder(vae),
        token=TokenMemory.of(denoiser),
        vae_channels=(channels[0], channels[min(1, len(channels) - 1)]),
        text_tokens=text_tokens,
        pixels_per_token=2 * vae.pixels_per_latent,
        double_blocks=denoiser.num_layers,
        single_blocks=denoiser.num_single_layers,
    )

"""How large a FLUX.2 is: its parameters, counted on the meta device, which takes no memory.

Called by `serving.placement`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.engine.model.autoencoder import Autoencoder, AutoencoderConfig
from calotype.serving.engine.model.components import read_settings
from calotype.serving.engine.model.decoder import pixels_per_token
from calotype.serving.engine.model.quantization import INT8_SCALE_BYTES, is_quantised
from calotype.serving.engine.model.text_model import TextModel, TextModelConfig
from calotype.serving.engine.model.transformer import Transformer, TransformerConfig
from calotype.serving.engine.model.weight_files import unfilled


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Parameters of a model's parts, and what its activations depend on.

    Attributes:
        in_layers: of each part, the parameters and the rows of the linear layers inside its
            repeated layers: what int8 makes smaller (`quantization`).
        vae_channels: channels of the VAE decoder at full resolution, and of what comes into it.
    """

    name: str
    denoiser: int
    text_encoder: int
    vae: int
    in_layers: Mapping[str, tuple[int, int]]
    token: TokenMemory
    vae_channels: tuple[int, int]
    text_tokens: int
    pixels_per_token: int

    def weight_bytes(self, part: str, precision: str) -> float:
        """Bytes of a part's weights: "denoiser", "text_encoder" or "vae"."""
        item = _item(precision)
        count: int = getattr(self, part)
        if precision != "int8" or part == "vae":
            return count * item
        small, rows = self.in_layers[part]
        return (count - small) * item + small + rows * INT8_SCALE_BYTES

    def denoiser_activations(self, pixels: int, precision: str) -> float:
        """Bytes of one picture in the denoiser."""
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
    def of(cls, denoiser: Transformer) -> TokenMemory:
        config = denoiser.config
        return cls(
            denoiser.inner_dim,
            int(denoiser.inner_dim * config.mlp_ratio),
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


def _item(precision: str) -> int:
    return 4 if precision == "float32" else 2


@dataclass(frozen=True, slots=True)
class KnownModel:
    """The published configuration of a model, as its Hugging Face repository states it."""

    denoiser: Mapping[str, Any]
    text_kind: str
    text: Mapping[str, Any]
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


def _config(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InvalidRequest(f"{path} cannot be read: {fault}.", param="model") from fault
    return {key: value for key, value in content.items() if not key.startswith("_")}


def _count_parts(
    name: str,
    denoiser_config: Mapping[str, Any],
    vae_config: Mapping[str, Any],
    text_kind: str,
    text_config: Mapping[str, Any],
    last_layer: int,
    text_tokens: int,
) -> ModelSizes:
    text = TextModelConfig.from_json(text_config, text_kind)
    with unfilled():
        denoiser = Transformer(TransformerConfig.from_json(denoiser_config))
        vae = Autoencoder(AutoencoderConfig.from_json(vae_config))
        text_encoder = TextModel(text, last_layer)

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    channels = vae.config.decoder_block_out_channels or vae.config.block_out_channels
    return ModelSizes(
        name=name,
        denoiser=count(denoiser),
        text_encoder=count(text_encoder),
        vae=count(vae),
        in_layers={"denoiser": _in_layers(denoiser), "text_encoder": _in_layers(text_encoder)},
        token=TokenMemory.of(denoiser),
        vae_channels=(channels[0], channels[min(1, len(channels) - 1)]),
        text_tokens=text_tokens,
        pixels_per_token=pixels_per_token(vae),
    )


def _in_layers(model: Any) -> tuple[int, int]:
    """Parameters and rows of the linear layers that int8 makes smaller."""
    weights = [
        module.weight for name, module in model.named_modules() if is_quantised(module, name)
    ]
    return sum(w.numel() for w in weights), sum(w.shape[0] for w in weights)
